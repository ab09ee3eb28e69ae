# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "hypothesis>=6.100,<7",    # properties: random sequences against models
#   "pytest>=8,<10",           # the tests
#   "webtest~=3.0.7",          # REST without a socket
# ]
# ///
"""Tests of cmres, in the order of its sections; run as a program, its benchmarks.

A test plays time itself: `world.now` is the clock of everything in it. Tests marked `openstack`
need a real cloud, named by OS_CLOUD, and are skipped where there is none.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import webtest
from hypothesis import HealthCheck, given, settings, strategies as st

import cmres
from cmres import Actor, Amount, Conflict, Forbidden, Invalid, NoCapacity, NotFound

UTC = timezone.utc
NOON = datetime(2026, 12, 1, 12, tzinfo=UTC)
MODULE = Path(cmres.__file__)


def hours(number: float) -> timedelta:
    return timedelta(hours=number)


class World:
    """A store, a simulated cloud, a service and a life cycle under one clock that tests set."""

    def __init__(self, path, **settings):
        cmres.open_store(str(path / 'cmres.db'))
        self.now = NOON.timestamp()
        self.config = cmres.Config(database=str(path / 'cmres.db'), **settings)
        self.clouds = cmres.Clouds(self.config, clock=lambda: self.now)
        self.service = cmres.Reservations(self.config, self.clouds, Actor('root', 'default', 'admin'), lambda: self.now)
        self.cycle = cmres.LifeCycle(self.config, self.clouds, lambda: self.now)
        self.service.resource_add('demo', cloud='simulated', vms=16)

    def as_user(self, user='eva', project='biology', role='user'):
        return self.service.acting(Actor(user, project, role))

    def at(self, hours_after_noon: float):
        """Sets the clock, and lets the life cycle do what is due then."""
        self.now = NOON.timestamp() + 3600 * hours_after_noon
        self.cycle.settle()

    def state(self, label: str) -> str:
        return self.service.list(label)[-1]['state']

    def there(self) -> list[str]:
        """The servers that the simulated cloud has."""
        return sorted(server.name for server in self.clouds.open('simulated').present())


@pytest.fixture
def world(tmp_path):
    yield World(tmp_path)
    cmres.close_store()


@pytest.fixture
def service(world):
    return world.service


@pytest.fixture
def app(world):
    """REST on behalf of an admin: app.get('/resource')."""
    token = world.service.token_add('root', 'default', 'admin')['token']
    return Rest(world, token)


class Rest:
    """The REST interface as one token's holder sees it."""

    def __init__(self, world, token):
        self.world, self.token = world, token
        self.web = webtest.TestApp(cmres.rest(world.service))

    def as_user(self, user='eva', project='biology', role='user'):
        return Rest(self.world, self.world.service.token_add(user, project, role)['token'])

    def call(self, verb: str, path: str, body=None, status=None, **headers):
        """The answer to one request; `body` becomes JSON unless it is bytes."""
        data = b'' if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {'Authorization': f'Bearer {self.token}', 'Content-Type': 'application/json'} | headers
        path = path if path.startswith('/cm/') or path.count('/') == 1 and '.' in path else cmres.BASE + path
        return self.web.request(path, method=verb, body=data, headers=headers, status=status)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command line in an empty folder: run('list') gives (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith('CMRES_')]:
        monkeypatch.delenv(name)

    def run(*argv):
        code = cmres.main(list(argv))
        return code, *capsys.readouterr()
    yield run
    cmres.close_store()


def test_smoke(world, app, run):
    pass
