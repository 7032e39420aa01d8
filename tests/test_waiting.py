"""Who waits for whom, told in a world with one host and one device, whose clocks are numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from distily import waiting
from distily.waiting import AHEAD, CYCLES, LEAD, PLAIN, Watch


class World:
    """The host launches work in order, up to 50 ms ahead; the device does a piece when it is launched and the pieces before are done."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        world = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                world.launch(0.0, 0.0)
                self.time = world.device

            def query(self):
                return self.time <= world.host

            def elapsed_time(self, other):
                return 1e3 * (other.time - self.time)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(0.0, cycles / CYCLES))
        monkeypatch.setattr(waiting.time, "perf_counter", lambda: self.host)

    def launch(self, host, device):
        self.host = max(self.host + host, self.device - 0.05)
        self.device = max(self.device, self.host) + device

    def wait(self):
        self.host = max(self.host, self.device)


def watched(world, pieces, log_every=None, hiccups=(), sizes=(1,), optimizer=None, accumulated=1, offset=0, most=40):
    """What is found in a training whose micro-batches launch ``pieces``, seconds of host and device; the latter grow with ``sizes``."""
    watch = Watch()
    for number, size in zip(range(most), itertools.cycle(sizes)):
        watch.begins(100 * size)
        if (found := watch.found()) is not None:
            return found, number
        for host, device in pieces:
            world.launch(host, device * size)
        if optimizer and number % accumulated == offset:
            world.launch(*optimizer)
        world.launch(1.0 if number in hiccups else 0.0, 0.0)
        if log_every and number % log_every == 0:
            world.wait()
    raise AssertionError("nothing was found")


FORWARD, LOSS, BACKWARD, OPTIMIZER = (0.004, 0.007), (0.003, 0.001), (0.018, 0.014), (0.009, 0.002)


@pytest.mark.parametrize("log_every", [None, 1, 3, 10])
def test_a_host_that_falls_behind_in_the_backward_alone(world, log_every):
    """The device works 24 of 34 ms, or of as many as 41 if the host waits for it in between."""
    (took, worked), _ = watched(world, [FORWARD, LOSS, BACKWARD, OPTIMIZER], log_every)
    assert worked == pytest.approx(24.0)
    assert took == pytest.approx(41.0 if log_every == 1 else 34.0)


@pytest.mark.parametrize("log_every", [None, 3, 10])
def test_a_device_that_is_the_limit(world, log_every):
    (took, worked), _ = watched(world, [(0.01, 0.04)], log_every)
    assert took == pytest.approx(40.0)
    assert worked == pytest.approx(40.0)


def test_a_device_that_is_waited_for_in_each_micro_batch_waits_too(world):
    (took, worked), _ = watched(world, [(0.01, 0.01), (0.01, 0.03)], 1)
    assert worked == pytest.approx(40.0)
    assert took == pytest.approx(50.0)


def test_what_is_compiled_in_between_does_not_count(world):
    (took, worked), _ = watched(world, [(0.01, 0.04)], hiccups=(0, 2))
    assert took == pytest.approx(40.0)
    assert worked == pytest.approx(40.0)
    assert world.device < 3.5


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3), (3, 1, 2, 1), (2, 3, 1)])
def test_of_several_sizes_the_commonest_is_compared(world, sizes):
    """The first one, where none is."""
    usual = 2 if len(sizes) == 3 else 1
    (took, worked), number = watched(world, [(0.002, 0.0006)] * 10, sizes=sizes, most=60)
    assert worked == pytest.approx(6.0 * usual)
    assert took == pytest.approx(20.0, rel=0.1)
    assert number < 40


@pytest.mark.parametrize("accumulated", [2, 3, 4])
@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize(("host", "took"), [(0.0004, 20.0), (0.003, 30.0)])
def test_micro_batches_with_and_without_the_optimizer_are_not_mixed(world, host, took, offset, accumulated):
    found, _ = watched(
        world, [(host, 0.002)] * 10, optimizer=(0.001, 0.004), accumulated=accumulated, offset=offset % accumulated
    )
    assert found == pytest.approx((took, 20.0), rel=0.1)


def test_the_host_does_not_wait_for_what_it_asks(world):
    """It asks again at the next micro-batch. The device is kept busy for as long as the host needs, and no longer."""
    _, number = watched(world, [(0.02, 0.01)])
    assert number <= PLAIN + AHEAD + 4
    assert world.device < 0.02 * (number + 1) + AHEAD * LEAD * 0.021


def test_what_came_in_between_is_not_timed(world):
    watch = Watch()
    for number in range(40):
        watch.begins(100)
        if watch.found():
            break
        world.launch(0.02, 0.01)
        if number % 2:
            watch.interrupted()
            world.launch(5.0, 5.0)
            world.wait()
    assert watch.found() == pytest.approx((30.0, 10.0))  # each right behind a wait


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)
