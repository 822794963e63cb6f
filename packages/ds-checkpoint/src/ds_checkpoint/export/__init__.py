"""Export to formats that other programs read."""

from ds_checkpoint.export.consolidate import Exported, convert, export, load_into, state_dict

__all__ = ["Exported", "convert", "export", "load_into", "state_dict"]
