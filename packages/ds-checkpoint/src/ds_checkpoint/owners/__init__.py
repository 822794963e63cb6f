"""Who owns the state of a model and its optimizer: another package, or the tensors themselves."""

from ds_checkpoint.owners.lookup import Claim, owner_of
from ds_checkpoint.owners.plain import PlainOwner

__all__ = ["Claim", "PlainOwner", "owner_of"]
