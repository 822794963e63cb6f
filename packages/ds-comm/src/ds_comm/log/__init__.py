"""Records of collectives: how often, how many bytes, how long, how fast, and which rank the others wait for."""

from ds_comm.log.comms_log import CommsLog, LogOptions
from ds_comm.log.summary import Line, Summary, summarise
from ds_comm.log.torch_calls import TorchCalls, watch_torch

__all__ = [
    "CommsLog",
    "Line",
    "LogOptions",
    "Summary",
    "TorchCalls",
    "summarise",
    "watch_torch",
]
