"""Load MSR-VTT, VATEX, ActivityNet Captions, LSMDC, Kinemoji and one's own JSONL from the files as published.

Every loader takes annotations, the folder with the videos (searched with its sub-folders) and a part, and
returns `Loaded`: the usable clips, each row that was left out with the reason, and each that was used after a
repair. A bad row costs that row; a file that is missing or cannot be parsed, or a part that has no rows at
all, raises `FormatError` in one line. Parts are `train`, `val`, `devtest`, `test`; the files and split names
behind them are the tables of `vqlora.data.writers`, and those of whole data sets are in
`vqlora.data.sources`.
"""

from vqlora.data.formats.activitynet import load_activitynet
from vqlora.data.formats.jsonl import load_jsonl
from vqlora.data.formats.kinemoji import load_kinemoji, read_truth
from vqlora.data.formats.lsmdc import load_lsmdc
from vqlora.data.formats.msrvtt import MSRVTT_FILES, MSRVTT_LISTS, load_msrvtt
from vqlora.data.formats.questions import attach_questions
from vqlora.data.formats.vatex import load_vatex
from vqlora.data.rows import FormatError
from vqlora.data.writers import (
    ACTIVITYNET_FILES,
    LSMDC_FILES,
    MSRVTT_SPLITS,
    VATEX_FILES,
    write_activitynet,
    write_id_list,
    write_jsonl,
    write_lsmdc,
    write_msrvtt,
    write_msrvtt_1ka,
    write_questions,
    write_truth,
    write_vatex,
)

__all__ = [
    "ACTIVITYNET_FILES", "LSMDC_FILES", "MSRVTT_FILES", "MSRVTT_LISTS", "MSRVTT_SPLITS", "VATEX_FILES",
    "FormatError", "attach_questions", "load_activitynet", "load_jsonl", "load_kinemoji", "load_lsmdc",
    "load_msrvtt", "load_vatex", "read_truth", "write_activitynet", "write_id_list", "write_jsonl",
    "write_lsmdc", "write_msrvtt", "write_msrvtt_1ka", "write_questions", "write_truth", "write_vatex",
]
