"""Own what property tests draw: tensors in a row, shards cut from them, whole manifests; sites and residency policies.

Never draws content: sizes and dtypes are all that the pure layers look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from weightcache.chunking import cut_file, cut_safetensors
from weightcache.dtypes import BITS, tensor_nbytes
from weightcache.header import TensorEntry
from weightcache.manifest import Manifest, Role, Shard

DTYPES = ("U8", "BOOL", "F4", "BF16", "F32", "F64", "C64")

# Few names, so that policies meet sites; an empty one is not known.
SITE_NAMES: Mapping[str, Sequence[str]] = {
    "provider": ("", "aws", "r2", "tigris"),
    "region": ("", "eu", "eu-west-1", "eu-west-10", "eu-west-2", "us-east-1"),
    "jurisdiction": ("", "ch", "eu", "us"),
}
POLICY_NAMES: Mapping[str, Sequence[str]] = {
    "providers": ("aws", "r2", "tigris"),
    "regions": ("eu", "eu-west-1", "us-east-1", "eu*", "eu-*", "eu-west-1*", "us-*"),
    "jurisdictions": ("ch", "eu", "us"),
}

# A loaded machine is no fault of what is drawn.
examples = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def sizes(limit: int, below: int) -> st.SearchStrategy[int]:
    """Draw a tensor's bytes: empty, packed (less than `below`), at an edge, or of several chunks."""
    at = [0, 1, limit // 2, limit - limit // 2, limit, 2 * limit]
    edges = [*at, below - 1, below, below + 1, limit - 1, limit + 1, 3 * limit + 1]
    return st.one_of(st.sampled_from(edges), st.integers(0, below - 1), st.integers(0, 3 * limit))


def in_a_row(
    data_start: int, forms: Sequence[tuple[str, tuple[int, ...]]], prefix: str = "t"
) -> tuple[TensorEntry, ...]:
    """Return tensors of these dtypes and shapes that lie one after the other."""
    tensors = []
    at = data_start
    for number, (dtype, shape) in enumerate(forms):
        stop = at + tensor_nbytes(dtype, shape)
        tensors.append(TensorEntry(f"{prefix}{number}", dtype, shape, at, stop))
        at = stop
    return tuple(tensors)


@st.composite
def shards(draw: st.DrawFn, path: str, limit: int) -> Shard:
    """Draw a file of weights cut at `limit`, or a file without tensors."""
    if draw(st.integers(0, 4)) == 0:
        nbytes = draw(st.integers(0, 3 * limit))
        return Shard(path, nbytes, "1", Role.FILE, cut_file(nbytes, limit))
    drawn = draw(st.lists(st.tuples(st.sampled_from(DTYPES), sizes(limit, limit)), max_size=8))
    forms = [(dtype, (nbytes * 8 // BITS[dtype],)) for dtype, nbytes in drawn]
    data_start = draw(st.integers(10, 2 * limit))
    tensors = in_a_row(data_start, forms, prefix=f"{path}.")
    stop = tensors[-1].stop if tensors else data_start
    return Shard(path, stop, "1", Role.WEIGHTS, cut_safetensors(data_start, tensors, limit), tensors)


@st.composite
def manifests(draw: st.DrawFn, limit: int) -> Manifest:
    """Draw a model of a few files whose chunks are cut at `limit`."""
    n_shards = draw(st.integers(1, 2))
    return Manifest.plain([draw(shards(f"file{number}", limit)) for number in range(n_shards)])


site_forms = st.fixed_dictionaries({kind: st.sampled_from(names) for kind, names in SITE_NAMES.items()})
_places = st.fixed_dictionaries(
    {}, optional={kind: st.lists(st.sampled_from(names), min_size=1) for kind, names in POLICY_NAMES.items()}
).filter(bool)
policy_forms = st.fixed_dictionaries({}, optional={"allow": _places, "deny": _places})
# Often one site and a rule that allows it: each policy by itself refuses half of all sites.
HOME = {"provider": "aws", "region": "eu-west-1", "jurisdiction": "eu"}
_every_site = [dict(zip(SITE_NAMES, names, strict=True)) for names in product(*SITE_NAMES.values())]
sites = st.sampled_from([HOME] * 2 * len(_every_site) + _every_site)
rules = st.one_of(st.just({}), st.just({}), st.just({"allow": {"jurisdictions": ["eu"]}}), policy_forms)
