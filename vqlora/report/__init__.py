"""Results files in, LaTeX and figures out: keys, tables, plots and the paper. Nothing here imports torch."""
