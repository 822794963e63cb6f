"""Who owns the state of a model and its optimizer: another package, or the tensors themselves."""

from ds_checkpoint.owners.lookup import Claim, owner_of

__all__ = ["Claim", "owner_of"]
