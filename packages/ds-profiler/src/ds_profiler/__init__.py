"""FLOPs, time and memory of a training job: counted, measured, and shown."""

from ds_profiler.flops import FlopsProfiler, ModuleProfile, Profile, Work, profile_model, text

__version__ = "0.1.0"

__all__ = ["FlopsProfiler", "ModuleProfile", "Profile", "Work", "profile_model", "text"]
