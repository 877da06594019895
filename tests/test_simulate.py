"""The simulation of benchmarks/simulate.py, where what it must come to can be worked out by hand."""

import pytest

from benchmarks.simulate import Costs, Found, Simulation, System

FREE = Costs(turn=0.0, request=0.0, reply=0.0, pipeline=0.0, command=0.0)
MANY = 200_000  # so many sessions that hardly two steps meet in one


def simulated(costs: Costs, *, rate: float = 0.0, clients: int = 0, **system: int) -> Found:
    return Simulation(System(costs, **system), rate=rate, clients=clients).run()


def test_a_step_that_is_alone_takes_what_its_parts_take() -> None:
    costs = Costs(turn=100e-6, request=60e-6, reply=40e-6, pipeline=70e-6, command=30e-6, wire=25e-6)
    found = simulated(costs, clients=1)
    assert found.mean == pytest.approx(2 * 25e-6 + 2 * 100e-6 + 60e-6 + 70e-6 + 30e-6 + 40e-6)
    assert found.p99 == pytest.approx(found.p50) == pytest.approx(found.mean)
    assert found.rate == pytest.approx(1 / found.mean, rel=1e-3)
    assert (found.a_turn, found.a_pipeline) == (0.5, 1)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_node_is_a_queue_with_a_known_wait(load: float) -> None:
    """Poisson arrivals, one server, always the same time: M/D/1, whose mean wait is ρ·s/(2·(1 − ρ))."""
    serving = 1e-3
    found = simulated(FREE._replace(command=serving, together=False), rate=load / serving, sessions=MANY)
    assert found.node == pytest.approx(load, rel=0.03)
    assert found.mean - serving == pytest.approx(load * serving / (2 * (1 - load)), rel=0.1)


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_store_is_full_where_arithmetic_says(nodes: int) -> None:
    """Sixteen processes that cost nothing: each node does 1 / (pipeline + command) commits that come one by one."""
    costs = FREE._replace(pipeline=60e-6, command=40e-6, together=False)
    found = simulated(costs, clients=400 * nodes, workers=16, nodes=nodes, sessions=MANY)
    assert found.rate == pytest.approx(nodes / 100e-6, rel=0.05)
    assert found.node > 0.95
    assert found.process == 0


def test_a_process_is_full_where_arithmetic_says() -> None:
    costs = Costs(turn=0.0, request=60e-6, reply=40e-6, pipeline=0.0, command=1e-9)
    found = simulated(costs, clients=64, sessions=MANY)
    assert found.rate == pytest.approx(1 / 100e-6, rel=0.02)
    assert found.process > 0.98


def test_what_comes_together_shares_a_turn() -> None:
    costs = Costs(turn=300e-6, request=60e-6, reply=40e-6, pipeline=80e-6, command=20e-6)
    one, many = simulated(costs, clients=1), simulated(costs, clients=32)
    assert many.a_pipeline > 8 * one.a_pipeline
    assert many.process / many.rate < 0.3 * one.process / one.rate


def test_a_session_has_one_commit_under_way() -> None:
    """Eight clients of one session: the first is committed alone, the seven that came meanwhile together, and while
    these are, the first has sent again. So eight steps take two commits, of a second each.
    """
    found = simulated(FREE._replace(command=1.0), clients=8, sessions=1)
    assert found.rate == pytest.approx(4, rel=0.01)
    assert found.a_pipeline == pytest.approx(4, rel=0.01)


def test_the_same_seed_gives_the_same_figures() -> None:
    costs = Costs(turn=100e-6, request=60e-6, reply=40e-6, pipeline=70e-6, command=30e-6)
    assert simulated(costs, rate=3_000, workers=2) == simulated(costs, rate=3_000, workers=2)
