"""Dispatch: problem and device in, kernel and launch out.

Pure: it imports the generator and nothing else, neither torch nor the driver.
"""

from gqa_cutlass.dispatch.choice import Choice
from gqa_cutlass.dispatch.device import MIN_CAPABILITY, Device, arch_of, model_device
from gqa_cutlass.dispatch.launch import Dispatch, choose_config, dispatch
from gqa_cutlass.dispatch.model import H200, MODELS, Model
from gqa_cutlass.dispatch.splits import MOST_TILES

__all__ = [
    "H200",
    "MIN_CAPABILITY",
    "MODELS",
    "MOST_TILES",
    "Choice",
    "Device",
    "Dispatch",
    "Model",
    "arch_of",
    "choose_config",
    "dispatch",
    "model_device",
]
