"""Parameters, operations and time of the modules of a model."""

from ds_profiler.flops.formulas import Formula, Work, products
from ds_profiler.flops.profile import ModuleProfile, Profile
from ds_profiler.flops.profiler import FlopsProfiler, profile_model
from ds_profiler.flops.report import count_text, text

__all__ = [
    "FlopsProfiler",
    "Formula",
    "ModuleProfile",
    "Profile",
    "Work",
    "count_text",
    "products",
    "profile_model",
    "text",
]
