"""Ray Data: building and explaining on many machines.

- :class:`Embed` and :class:`Explain` are for ``Dataset.map_batches``, in pools of actors, and
  :class:`Prepare` decodes pictures in tasks of their own.
- :func:`build` makes a database, :func:`explain` writes maps; both continue where they were
  killed.
- :func:`pool` says how many actors a cluster has room for next to what reads the data.

Ray is imported when it is first needed.
"""

from gcfast.ray.actors import Embed, Explain
from gcfast.ray.cluster import Pool, pool
from gcfast.ray.distributed import build
from gcfast.ray.pictures import Prepare
from gcfast.ray.write import Written, explain

__all__ = ["Embed", "Explain", "Pool", "Prepare", "Written", "build", "explain", "pool"]
