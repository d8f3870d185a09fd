"""What single notebooks ask of their runs: planned claims, learning rates settled, tables of results.

A module a notebook: `method_study` (03), `gate_study` (05), `rank_study` (06), `bit_study` (08),
`placement_study` (09), `scaling_study` (10), `confirm_study` (15). What several of them share is in
`vqlora.comparison`; 04, 07, 11, 12 and 14 have packages of their own.
"""
