"""The owner of the state of a model and its optimizer: another package, or `PlainOwner`."""

from ds_checkpoint.owners.lookup import Claim, owner_of

__all__ = ["Claim", "owner_of"]
