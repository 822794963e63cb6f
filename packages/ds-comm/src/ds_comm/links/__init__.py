"""Links between ranks: how fast they are, and whether compressing what they carry gains time."""

from ds_comm.links.costs import Codec, Comparison, Link, Links, gather, one_bit, reduce
from ds_comm.links.measure import measure_links

__all__ = ["Codec", "Comparison", "Link", "Links", "gather", "measure_links", "one_bit", "reduce"]
