"""Results files in, LaTeX and figures out: keys, claims, tables, plots and the paper; and the proof of them.

Nothing here imports torch, but for what `recompute` makes again from rows per example.
"""
