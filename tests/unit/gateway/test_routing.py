from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.routing import HOLD_S, choose_route
from shared.inference.errors import ApiError
from shared.inference.principal import ModelView, Principal, ResourceView, Route

NOW_S = 1_000_000.0
TEAM = Principal("key_1", "team_a", "acme", False, False, frozenset({"inference"}))
FALLBACK = replace(TEAM, ppt_fallback=True)
MODEL = ModelView("mod_1", "team_a", "acme", "tiny", 1, "mod_1/1", "0" * 16, "tiny", 64, 258, (257,), 0)


def make_resource(resource_id: str = "res_own", **changes: object) -> ResourceView:
    made = ResourceView(resource_id, "team_a", "tiny", False, "on", "live", 1, 64, None, 100.0)
    return replace(made, **changes)  # type: ignore[arg-type]


LIVE = make_resource()
OFF = make_resource(wanted="off", state="off", live_count=0)
POOL = make_resource("res_pool", team_id="team_p", pool=True)
STARTING = make_resource(state="starting", live_count=0)


def starting_in(seconds: float | None) -> ResourceView:
    return replace(STARTING, expected_live_unix_s=None if seconds is None else NOW_S + seconds)


ROUTES = [
    ("own and live", TEAM, [LIVE], ("res_own", "resource")),
    ("own before pool", TEAM, [POOL, LIVE], ("res_own", "resource")),
    ("own before pool with fallback too", FALLBACK, [POOL, LIVE], ("res_own", "resource")),
    ("none of its own", TEAM, [POOL], ("res_pool", "ppt")),
    ("off, with fallback", FALLBACK, [OFF, POOL], ("res_pool", "ppt")),
    ("starting far off, with fallback", FALLBACK, [starting_in(300), POOL], ("res_pool", "ppt")),
    ("another type's is none", TEAM, [replace(OFF, model_type="big"), POOL], ("res_pool", "ppt")),
    ("another team's is none", TEAM, [replace(LIVE, team_id="team_b"), POOL], ("res_pool", "ppt")),
    ("first made takes the traffic", TEAM, [make_resource("res_2", created_unix_s=200.0), LIVE], ("res_own", "resource")),
    ("nearly there", TEAM, [starting_in(HOLD_S)], ("res_own", "resource")),
    ("a little overdue", TEAM, [starting_in(-5)], ("res_own", "resource")),
    ("one ready while the second starts", TEAM, [replace(STARTING, live_count=1)], ("res_own", "resource")),
    ("asleep, woken by requests", TEAM, [replace(STARTING, state="asleep", wakes=True)], ("res_own", "resource")),
    ("waking, far off", TEAM, [replace(starting_in(300), wakes=True)], ("res_own", "resource")),
    ("falling asleep", TEAM, [replace(STARTING, state="draining", wakes=True)], ("res_own", "resource")),
    ("turned on a moment ago", TEAM, [replace(OFF, wanted="on", wakes=True)], ("res_own", "resource")),
    ("draining back to on", TEAM, [replace(LIVE, state="draining")], ("res_own", "resource")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "principal", "resources", "route"), ROUTES, ids=[row[0] for row in ROUTES])
def test_a_request_goes_to(
    name: str, principal: Principal, resources: list[ResourceView], route: tuple[str, str]
) -> None:
    chosen = choose_route(principal, MODEL, resources, NOW_S)
    assert isinstance(chosen, Route)
    assert (chosen.resource.resource_id, chosen.billing) == route


REFUSALS = [
    ("off", TEAM, [OFF], 409, "resource_off", None),
    ("off, no fallback to the pool", TEAM, [OFF, POOL], 409, "resource_off", None),
    ("off, fallback but no pool", FALLBACK, [OFF], 409, "resource_off", None),
    ("off, fallback but the pool is off too", FALLBACK, [OFF, replace(POOL, wanted="off")], 409, "resource_off", None),
    ("draining to off", TEAM, [replace(LIVE, wanted="off", state="draining")], 409, "resource_off", None),
    ("asleep", TEAM, [replace(LIVE, state="asleep", live_count=0)], 409, "resource_asleep", None),
    ("woken by requests, and its starts fail", TEAM, [replace(LIVE, state="failed", live_count=0, wakes=True)], 503, "resource_failed", "60"),
    ("woken by requests, and off", TEAM, [replace(OFF, wakes=True)], 409, "resource_off", None),
    ("first one off, second live", TEAM, [OFF, make_resource("res_2", created_unix_s=200.0)], 409, "resource_off", None),
    ("starting, unknown when", TEAM, [starting_in(None)], 503, "resource_starting", "30"),
    ("starting, far off", TEAM, [starting_in(120.5)], 503, "resource_starting", "121"),
    ("starting, just beyond the hold", TEAM, [starting_in(HOLD_S + 0.1)], 503, "resource_starting", "21"),
    ("starting, long overdue", TEAM, [starting_in(-60)], 503, "resource_starting", "1"),
    ("starting in a week", TEAM, [starting_in(7 * 86400)], 503, "resource_starting", "600"),
    ("on, not yet seen by the scheduler", TEAM, [replace(OFF, wanted="on")], 503, "resource_starting", "30"),
    ("failed", TEAM, [replace(LIVE, state="failed", live_count=0, reason="no GPU")], 503, "resource_failed", "60"),
    ("nothing", TEAM, [], 409, "no_resource", None),
    ("pool off", TEAM, [replace(POOL, wanted="off", state="off", live_count=0)], 409, "no_resource", None),
    ("pool starting", TEAM, [replace(starting_in(60), pool=True, team_id="p")], 503, "resource_starting", "60"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "principal", "resources", "status", "code", "retry_after"),
    REFUSALS,
    ids=[row[0] for row in REFUSALS],
)
def test_a_request_is_refused(
    name: str,
    principal: Principal,
    resources: list[ResourceView],
    status: int,
    code: str,
    retry_after: str | None,
) -> None:
    refused = choose_route(principal, MODEL, resources, NOW_S)
    assert isinstance(refused, ApiError)
    assert (refused.status, refused.code, refused.headers.get("Retry-After")) == (status, code, retry_after)
    assert (refused.headers.get("x-should-retry") == "false") == (status == 409)


resources = st.builds(
    ResourceView,
    resource_id=st.sampled_from(["res_1", "res_2", "res_3"]),
    team_id=st.sampled_from(["team_a", "team_b"]),
    model_type=st.sampled_from(["tiny", "big"]),
    pool=st.booleans(),
    wanted=st.sampled_from(["on", "off"]),
    state=st.sampled_from(["off", "starting", "live", "draining", "asleep", "failed"]),
    live_count=st.integers(0, 2),
    max_context_tokens=st.just(64),
    expected_live_unix_s=st.none() | st.floats(NOW_S - 100, NOW_S + 100),
    created_unix_s=st.floats(0, 100),
)


@given(st.lists(resources, max_size=5), st.booleans())
def test_nobody_runs_on_anothers_gpus_or_pays_per_token_by_surprise(
    found: list[ResourceView], fallback: bool
) -> None:
    route = choose_route(replace(TEAM, ppt_fallback=fallback), MODEL, found, NOW_S)
    if isinstance(route, ApiError):
        return
    assert route.resource.model_type == "tiny"
    assert route.resource.wanted == "on"
    assert route.resource.pool == (route.billing == "ppt")
    if not route.resource.pool:
        assert route.resource.team_id == "team_a"
    elif not fallback:
        assert not [r for r in found if r.team_id == "team_a" and r.model_type == "tiny" and not r.pool]
