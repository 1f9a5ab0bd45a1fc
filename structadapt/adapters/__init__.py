"""LoRA, DoRA and QuanTA. A new adapter is one file here and one line below."""

from structadapt.adapters.base import Adapter
from structadapt.adapters.dora import DoRA
from structadapt.adapters.lora import LoRA
from structadapt.adapters.quanta import QuanTA

__all__ = ["Adapter", "DoRA", "LoRA", "QuanTA"]
