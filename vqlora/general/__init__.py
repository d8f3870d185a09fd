"""How far what was learned reaches: to other domains, languages, tasks and numbers of frames.

`run.execute` makes a run whose settings ask for captions in other languages or for further evaluations
(`languages`, `also_domains`, `also_frames`, `also_languages` of `RunSettings`), `study` is what notebook 11
makes of such runs.
"""
