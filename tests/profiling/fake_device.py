"""A device and a host whose clocks are numbers: timings of it are known exactly."""

from dataclasses import dataclass


@dataclass
class Event:
    at: float


class FakeTimer:
    """Work is issued in order; the device begins each when it is free and the host has issued it."""

    def __init__(self):
        self.host = 0.0
        self.device = 0.0
        self.stalls = []

    def work(self, host_seconds, device_seconds):
        """What a call does: the host spends its time, then the device has something to do."""
        self.host += host_seconds
        self.device = max(self.device, self.host) + device_seconds

    def stall(self, seconds):
        self.stalls.append(seconds)
        self.work(0.0, seconds)

    def mark(self):
        # An event in an idle device's queue happens when it is issued.
        return Event(max(self.device, self.host))

    def passed(self, event):
        return event.at <= self.host

    def elapsed(self, start, end):
        self.synchronize()
        return end.at - start.at

    def synchronize(self):
        self.host = max(self.host, self.device)

    def now(self):
        return self.host
