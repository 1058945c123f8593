"""What property tests draw from."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from torchtitan_upipe.cp.head_schedule import HeadSchedule, build_head_schedule

# for machines that do other work meanwhile
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def schedules(draw: st.DrawFn, max_heads: int = 40, max_degree: int = 16) -> HeadSchedule:
    """Any head counts, any number of ranks, any chunk."""
    degree = draw(st.integers(1, max_degree))
    heads = draw(st.integers(1, max_heads))
    kv_heads = draw(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0]))
    return build_head_schedule(heads, kv_heads, degree, head_chunk=draw(st.integers(1, heads)))
