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


# Capacity ####################################################################


def brute_force_peak(held: dict, begin: int, until: int) -> tuple:
    """The greatest sums held at any instant of a window, from nothing but the list of what is held."""
    instants = [begin, *(at for b, u, _ in held.values() for at in (b, u) if begin <= at < until)]
    return tuple(max(sum(amount[i] for b, u, amount in held.values() if b <= at < u) for at in instants)
                 for i in range(3))


def test_steps_agree_with_brute_force_over_thousands_of_random_changes(world):
    """THE RULE against a model that looks at every instant; refusals and the kept usage as well."""
    chance, held, refused = random.Random(20), {}, 0
    place = world.service.resource_row('demo')._replace(vms=12, vcpus=30, ram=60)
    for turn in range(4000):
        if held and chance.random() < 0.45:
            begin, until, amount = held.pop(chance.choice(list(held)))
            with cmres.transaction():
                cmres.release(place.id, begin, until, amount)
            continue
        begin = chance.randrange(200)
        until, amount = begin + chance.randrange(1, 60), Amount(*(chance.randrange(1, n) for n in (6, 15, 30)))
        peak = brute_force_peak(held, begin, until)
        room = all(used + need <= most for used, need, most in zip(peak, amount, (12, 30, 60)))
        assert tuple(cmres.peak(place.id, begin, until)) == peak
        try:
            with cmres.transaction():
                cmres.admit(place, begin, until, amount, now=0)
            held[turn] = begin, until, amount
            assert room
        except NoCapacity:
            refused += 1
            assert not room
    assert refused > 300
    for begin, until, amount in held.values():
        cmres.release(place.id, begin, until, amount)
    assert cmres.rows('SELECT * FROM step') == []  # canonical: nothing held leaves nothing behind


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(['add', 'update', 'extend', 'delete', 'tick']), st.integers(0, 7),
                          st.integers(0, 30), st.integers(1, 12), st.integers(1, 9)), max_size=40))
def test_any_sequence_of_requests_keeps_the_promise(tmp_path_factory, sequence):
    """What the service answers is what a list of reservations would allow; `check` finds no drift."""
    world = World(tmp_path_factory.mktemp('w'))
    booked, start = {}, NOON
    for verb, who, begin, length, vms in sequence:
        label, first = f'r{who}', start + hours(begin + 1)
        window = (first, first + hours(length), vms)
        if verb == 'tick':
            world.at((world.now - NOON.timestamp()) / 3600 + 0.5)
        booked = {name: each for name, each in booked.items() if each[1].timestamp() > world.now}
        others = [each for name, each in booked.items() if name != label or verb == 'add']
        if verb == 'extend' and label in booked:
            window = (booked[label][0], booked[label][1] + hours(length), booked[label][2])
        begun = label in booked and booked[label][0].timestamp() <= world.now
        now = datetime.fromtimestamp(world.now, UTC)
        instants = [max(window[0], now), *(max(each[0], now) for each in others)]
        room = all(sum(each[2] for each in others if each[0] <= at < each[1]) + window[2] <= 16
                   for at in instants if window[0] <= at < window[1])
        try:
            if verb == 'add':
                world.service.add(label, 'demo', *window[:2], vms=vms)
            elif verb == 'update':
                world.service.update(label, start=window[0], end=window[1], vms=vms)
            elif verb == 'extend':
                world.service.extend(label, hours(length))
            elif verb == 'delete':
                world.service.delete(label)
        except NoCapacity:
            assert not room
        except NotFound:
            assert label not in booked
        except (Conflict, Invalid):
            assert verb != 'delete'
            assert begun or window[0].timestamp() < world.now or verb == 'add' and label in booked
        else:
            if verb == 'delete':
                del booked[label]
            elif verb in ('add', 'update', 'extend'):
                assert room and (verb == 'add') == (label not in booked)
                booked[label] = window
        assert world.service.check()['differences'] == 0
    cmres.close_store()


def test_back_to_back_fits_and_an_enclosing_request_does_not(service):
    """The ancestor refused the first and admitted the second."""
    service.add('a', 'demo', NOON + hours(2), NOON + hours(4), vms=16)
    service.add('before', 'demo', NOON + hours(1), NOON + hours(2), vms=16)
    service.add('after', 'demo', NOON + hours(4), NOON + hours(5), vms=16)
    with pytest.raises(NoCapacity):
        service.add('around', 'demo', NOON + hours(0.5), NOON + hours(6))


def test_lead_is_held_too(service):
    service.add('a', 'demo', NOON + hours(2), NOON + hours(4), vms=16, lead=hours(1))
    with pytest.raises(NoCapacity) as refusal:
        service.add('b', 'demo', NOON + hours(0.5), NOON + hours(2), vms=1)
    assert refusal.value.details['longest'] == '30m'
    service.add('b', 'demo', NOON + hours(0.5), NOON + hours(1), vms=16)


def test_vcpus_and_ram_of_the_flavor_count(service):
    service.resource_add('small', cloud='simulated', vcpus=8, ram=40000)
    service.add('a', 'small', NOON, NOON + hours(1), vms=2, flavor='m1.medium')
    with pytest.raises(NoCapacity, match='has 4 of 8 vcpus free') as refusal:
        service.add('b', 'small', NOON, NOON + hours(1), vms=3, flavor='m1.medium')
    assert refusal.value.details['most_vms'] == 2


ADDER = """
import sys, threading
import cmres
path, process, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
cmres.open_store(path)
config = cmres.Config(database=path)
service = cmres.Reservations(config, cmres.Clouds(config), cmres.Actor('u', 'p', 'admin'))
taken, refused, other = [], [], []
def add(n):
    try:
        taken.append(service.add(f'r-{process}-{n}', 'ten', service.here.now + cmres.timedelta(hours=1), cmres.timedelta(hours=1)))
    except cmres.NoCapacity as error:
        refused.append(error.status)
    except Exception as error:
        other.append(repr(error))
workers = [threading.Thread(target=add, args=(n,)) for n in range(threads)]
for each in workers: each.start()
for each in workers: each.join()
print(len(taken), refused.count(409), other)
"""


def test_processes_and_threads_adding_at_once_never_overbook(world):
    """8 processes with 32 threads each, room for 10: 10 admitted, all others a 409."""
    world.service.resource_add('ten', vms=10)
    crowd = [subprocess.Popen([sys.executable, '-c', ADDER, world.config.database, str(n), '32'], cwd=MODULE.parent,
                              stdout=subprocess.PIPE, text=True) for n in range(8)]
    counts = [each.communicate(timeout=120)[0].split(maxsplit=2) for each in crowd]
    assert [other for _, _, other in counts] == ['[]\n'] * 8
    assert sum(int(taken) for taken, _, _ in counts) == 10
    assert sum(int(refused) for _, refused, _ in counts) == 246
    assert world.service.check()['differences'] == 0


def test_a_writer_killed_in_mid_transaction_leaves_no_trace(world):
    program = ADDER.replace("print(", "cmres.hold = lambda *a: __import__('os').kill(__import__('os').getpid(), 9)\nadd(99)\nprint(")
    world.service.resource_add('ten', vms=10)
    killed = subprocess.run([sys.executable, '-c', program, world.config.database, '1', '1'], cwd=MODULE.parent, timeout=60)
    assert killed.returncode == -9
    assert [each.label for each in cmres.rows('SELECT label FROM reservation')] == ['r-1-0']
    assert world.service.check()['differences'] == 0


# Life cycle ##################################################################


def book(world, label='lab', start=1, length=1, **asked):
    """Reserves machines that boot, by hours after noon."""
    asked = {'vms': 3, 'flavor': 'm1.small', 'image': 'cirros'} | asked
    return world.service.add(label, 'demo', NOON + hours(start), NOON + hours(start + length), **asked)


def test_machines_are_up_from_start_to_end_and_at_no_other_time(world):
    book(world)
    world.at(0.99)
    assert world.there() == [] and world.state('lab') == 'reserved'
    world.at(1)
    assert world.there() == ['lab-1-1', 'lab-1-2', 'lab-1-3'] and world.state('lab') == 'starting'
    world.at(1.01)
    assert world.state('lab') == 'active'
    servers = world.service.servers('lab')
    assert {each['state'] for each in servers} == {'active'} and all(each['addresses'] for each in servers)
    assert {each['begun'] for each in servers} == {NOON + hours(1)}
    world.at(2)
    assert world.there() == [] and world.state('lab') == 'ending'
    world.at(2.01)
    assert world.state('lab') == 'ended'
    assert {each['state'] for each in world.service.servers('lab')} == {'deleted'}


def test_repeating_the_pass_changes_nothing(world):
    book(world)
    for moment in (1, 1.01):
        world.at(moment)
        before = world.there(), cmres.rows('SELECT id, tries, state FROM server')
        for _ in range(5):
            world.cycle.settle()
        assert (world.there(), cmres.rows('SELECT id, tries, state FROM server')) == before


def test_lead_boots_ahead(world):
    book(world, lead=timedelta(minutes=6))
    world.at(0.9)
    assert len(world.there()) == 3 and world.state('lab') == 'starting'


def test_without_an_image_nothing_boots_and_time_alone_makes_the_state(world):
    world.service.add('hold', 'demo', NOON + hours(1), NOON + hours(2), vms=4)
    world.now += 3600
    assert world.state('hold') == 'active'
    world.cycle.settle()
    world.now += 3600
    assert world.state('hold') == 'ended' and world.there() == []


def test_a_window_that_is_over_is_never_started(world):
    book(world)
    world.at(2)
    assert world.there() == [] and world.state('lab') == 'failed'
    assert [each['code'] for each in world.service.events('lab')] == ['added', 'failed']


def test_one_that_is_late_starts_late_and_says_so(world):
    book(world)
    world.at(1.5)
    world.at(1.51)
    server = world.service.servers('lab')[0]
    assert (server['planned'], server['begun']) == (NOON + hours(1), NOON + hours(1.5))


def test_cancelling_removes_machines_and_frees_capacity_at_once(world):
    book(world, vms=16)
    world.at(1.1)
    world.service.delete('lab')
    book(world, 'next', start=1.2, vms=16)
    assert world.state('lab') == 'ending'
    world.cycle.settle()
    assert world.there() == []
    world.at(1.11)
    assert world.state('lab') == 'cancelled'


def test_extended_in_the_last_second_machines_stay(world):
    book(world)
    world.at(1.1)
    before = world.there()
    world.now = NOON.timestamp() + 7199
    world.service.extend('lab', hours(1))
    for moment in (2, 2.5, 2.99):
        world.at(moment)
        assert world.there() == before and world.state('lab') == 'active'
    world.at(3)
    assert world.there() == []


def test_growing_and_shrinking_while_active(world):
    book(world)
    world.at(1)
    world.at(1.1)
    world.service.update('lab', vms=5)
    assert world.state('lab') == 'degraded'
    world.cycle.settle()
    world.at(1.2)
    assert len(world.there()) == 5 and world.state('lab') == 'active'
    world.service.update('lab', vms=2)
    world.cycle.settle()
    assert world.there() == ['lab-1-1', 'lab-1-2']


def test_a_boot_that_fails_is_tried_again_with_growing_pauses(tmp_path):
    world = World(tmp_path, simulated_vms=2, retry_first=60)
    book(world)
    world.at(1)
    for minutes in range(1, 30):
        world.at(1 + minutes / 60)
    tries = max(each['tries'] for each in world.service.servers('lab'))
    assert 4 <= tries <= 8 and world.state('lab') == 'degraded'
    assert world.service.list('lab')[0]['fault'] == 'No valid host was found.'
    object.__setattr__(world.config, 'simulated_vms', 3)
    for minutes in range(30, 45):
        world.at(1 + minutes / 60)
    assert world.state('lab') == 'active' and len(world.there()) == 3


class LosesAnswers(cmres.Simulated):
    """A cloud that makes the server and then answers 500."""
    def boot(self, machine):
        super().boot(machine)
        raise cmres.CloudError('the cloud simulated could not make a server: 500', sure=False)


def test_a_server_whose_answer_was_lost_is_adopted_by_its_mark(world):
    world.clouds.opened['simulated'] = LosesAnswers('simulated', world.clouds.store, world.config, lambda: world.now)
    book(world)
    world.at(1)
    world.at(1.1)
    assert world.state('lab') == 'active'
    assert len(world.there()) == 3 and {each['tries'] for each in world.service.servers('lab')} == {1}


def test_a_crash_after_the_intent_and_before_the_call_boots_once(world):
    """Another process takes over after the first wrote its intents and died."""
    book(world)
    world.now = NOON.timestamp() + 3600
    world.cycle.submit = lambda *_: None  # dies here
    world.cycle.converge(world.now)
    assert {each['state'] for each in world.service.servers('lab')} == {'build'}
    world.cycle = cmres.LifeCycle(world.config, world.clouds, lambda: world.now)
    for minutes in (1, 2, 3, 4):
        world.at(1 + minutes / 60)
    assert len(world.there()) == 3 and world.state('lab') == 'active'


def test_a_vanished_server_is_replaced(world):
    book(world)
    world.at(1)
    world.at(1.01)
    cmres.SimulatedServer.update(gone=world.now).where(cmres.SimulatedServer.name == 'lab-1-2').execute()
    for minutes in (2, 3, 4):
        world.at(1 + minutes / 60)
    assert world.there() == ['lab-1-1', 'lab-1-2', 'lab-1-3'] and world.state('lab') == 'active'
    assert 'vanished' in [each['code'] for each in world.service.events('lab')]


def test_our_servers_that_nothing_wants_go_and_others_stay(world):
    book(world)
    world.at(1)
    cloud = world.clouds.open('simulated')
    cloud.boot(cmres.Machine('ours', f'{world.clouds.store}-999-1', 'm1.tiny', 'cirros'))
    for minutes in (2, 4, 6):
        world.at(1 + minutes / 60)
    assert world.there() == ['lab-1-1', 'lab-1-2', 'lab-1-3']


def test_a_cloud_that_hangs_delays_no_other(tmp_path):
    world = World(tmp_path)
    world.service.resource_add('other', cloud='simulated-2', vms=16)
    hanging, release = world.clouds.open('simulated-2'), threading.Event()
    hanging.boot = lambda machine: release.wait(60)
    world.service.add('a', 'other', NOON + hours(1), NOON + hours(2), vms=8, flavor='m1.tiny', image='cirros')
    book(world)
    world.now = NOON.timestamp() + 3600
    world.cycle.converge(world.now)
    while len(world.there()) < 3:
        world.cycle.wake.wait(5)
        world.cycle.wake.clear()
        world.cycle.converge(world.now)
    assert {each['state'] for each in world.service.servers('a')} == {'build'}
    release.set()
    world.cycle.settle()


# OpenStack ###################################################################

openstack = pytest.mark.openstack
real = pytest.mark.skipif('OS_CLOUD' not in os.environ, reason='OS_CLOUD names no cloud to test with')


def until(condition, seconds=120):
    """Waits for something that a real cloud does in its own time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, 'it took too long'
        time.sleep(0.3)
    return found


@pytest.fixture
def lab(tmp_path):
    """A service on the real cloud OS_CLOUD, its life cycle running; every server of ours is removed at the end."""
    world = World(tmp_path, poll=0.5, retry_first=2, settle=3)
    world.service.clock = world.cycle.clock = world.clouds.clock = time.time
    world.service.wake = world.cycle.wake.set
    world.service.resource_add('lab', cloud=os.environ['OS_CLOUD'], vms=40, vcpus=80)
    world.cloud, stop = world.clouds.open(os.environ['OS_CLOUD']), threading.Event()
    thread = threading.Thread(target=world.cycle.run, args=(stop,))
    thread.start()
    yield world
    stop.set()
    world.cycle.wake.set()
    thread.join()
    for server in world.cloud.servers():
        world.cloud.delete(server.uid)
    cmres.close_store()


WISH = {'flavor': 'm1.tiny', 'image': 'tiny', 'network': 'lab-net', 'key': 'lab-key'}


@openstack
@real
def test_five_machines_run_on_openstack_from_start_to_end(lab):
    start = lab.service.here.now + timedelta(seconds=6)
    lab.service.add('class', 'lab', start, start + timedelta(seconds=60), vms=5, security_groups=['default'],
                    user_data='#!/bin/sh', metadata={'course': 'os'}, **WISH)
    while datetime.now(UTC) < start:
        early = lab.cloud.servers()
        assert datetime.now(UTC) >= start or early == []
        time.sleep(0.5)
    until(lambda: lab.state('class') == 'active')
    seen = lab.cloud.servers()
    assert len(seen) == 5 and all(each.state == 'active' and each.addresses for each in seen)
    stranger = lab.as_user('mallory', 'elsewhere')
    with pytest.raises(NotFound):
        stranger.show('class')
    with pytest.raises(NotFound):
        stranger.delete('class')
    assert stranger.list() == []
    until(lambda: lab.state('class') == 'ended')
    assert lab.cloud.servers() == []


@openstack
@real
@pytest.mark.parametrize('field', ['flavor', 'image', 'network', 'key', 'security_groups'])
def test_what_openstack_does_not_know_is_refused_by_name(lab, field):
    wish = WISH | {field: ['nosuch'] if field == 'security_groups' else 'nosuch'}
    with pytest.raises(Invalid, match="'nosuch'"):
        lab.service.add('x', 'lab', NOON + hours(24 * 3650), hours(1), **wish)


@openstack
@real
def test_a_cancel_in_mid_boot_leaves_nothing_on_openstack(lab):
    lab.service.add('short', 'lab', lab.service.here.now, hours(1), vms=4, **WISH)
    until(lambda: any(each['uid'] for each in lab.service.servers('short')))
    lab.service.delete('short')
    until(lambda: lab.state('short') == 'cancelled')
    assert lab.cloud.servers() == []


@openstack
@real
def test_a_project_uses_its_own_credentials(lab):
    """What biology reserves is made in biology's account, and the resource's own account doesn't see it."""
    object.__setattr__(lab.config, 'credentials', {f"biology@{os.environ['OS_CLOUD']}": 'lab-user2'})
    lab.as_user().add('cells', 'lab', lab.service.here.now, hours(1), **WISH)
    until(lambda: lab.state('cells') == 'active')
    theirs = lab.clouds.open('lab-user2')
    assert len(theirs.servers()) == 1 and lab.cloud.servers() == []
    lab.service.delete('cells')
    until(lambda: theirs.servers() == [])


# Benchmarks ##################################################################
#
# Each figure is a ratio to the least that could be done, measured by turns in one run on the same
# files: other load on the machine hits both sides alike.


def by_turns(repeat: int, *actions) -> list[float]:
    """The median seconds of each action, measured by turns."""
    times = [[] for _ in actions]
    for turn in range(repeat):
        for seconds, action in zip(times, actions):
            began = time.perf_counter()
            action(turn)
            seconds.append(time.perf_counter() - began)
    return [sorted(seconds)[repeat // 2] for seconds in times]


def show(name: str, ours: float, bare: float, note: str = '') -> float:
    print(f'{name:58} {ours * 1e3:9.3f} ms  against {bare * 1e3:9.3f} ms  = {ours / bare:6.2f} x  {note}', flush=True)
    return ours / bare


def fill(world, number: int, resources: int) -> None:
    """Puts reservations into the store as `add` would, but many at a time; a tenth of them are over."""
    chance, now = random.Random(number), int(world.now)
    names = [f'place-{n}' for n in range(resources)]
    for name in names:
        world.service.resource_add(name, vms=10**9)
    first = cmres.row('SELECT min(id) AS id FROM resource WHERE name LIKE ?', 'place-%').id
    reservation = {'user': 'u', 'project': 'p', 'flavor': '', 'image': '', 'network': '', 'key': '',
                   'security_groups': '[]', 'user_data': '', 'metadata': '{}', 'lead': 0, 'description': '',
                   'added': now, 'changed': now}
    def lines():
        for n in range(1, number + 1):
            start = now + 60 * chance.randrange(-18 * 1440, 162 * 1440)
            yield n, start, start + 1800 * chance.randrange(1, 24), chance.randrange(1, 5), first + n % resources
    with cmres.transaction():
        cursor = cmres.db.connection()
        cursor.executemany('INSERT INTO reservation (id, label, over, ' + ', '.join(f'"{c}"' for c in reservation)
                           + ') VALUES (?, ?, ?' + ', ?' * len(reservation) + ')',
                           ((n, f'r{n}', end, *reservation.values()) for n, _, end, _, _ in lines()))
        chance.seed(number)
        cursor.executemany('INSERT INTO occurrence (id, reservation_id, resource_id, start, "end", held_from, held_until,'
                           ' vms, vcpus, ram, due) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?)',
                           ((n, n, place, start, end, start, end, vms, vms, start if end > now else None)
                            for n, start, end, vms, place in lines()))
        for place in range(first, first + resources):
            cursor.executemany('INSERT INTO step VALUES (?, ?, ?, ?, ?)',
                               ((place, at, *held) for at, held in cmres.held_steps(place)))
        cursor.execute('CREATE TABLE bare AS SELECT * FROM reservation LIMIT 0')
        cursor.execute('CREATE INDEX bare_label ON bare (project, label, over)')
    cmres.db.execute_sql('ANALYZE')
    cmres.db.execute_sql('PRAGMA wal_checkpoint(TRUNCATE)')


def bench_add(folder: Path) -> None:
    for resources in (1, 100):
        seen = {}
        for number in (10**3, 10**4, 10**5, 10**6):
            path = folder / f'{resources}-{number}'
            path.mkdir()
            world = World(path)
            fill(world, number, resources)
            chance = random.Random(1)

            def add(turn):
                start = NOON + timedelta(minutes=chance.randrange(10, 150 * 1440))
                world.service.add(f'new-{turn}', f'place-{chance.randrange(resources)}', start,
                                  start + timedelta(minutes=30 * chance.randrange(1, 24)), vms=2)

            def bare(turn):
                with cmres.transaction():
                    cmres.db.execute_sql('INSERT INTO bare SELECT * FROM reservation WHERE id = ?', (turn + 1,))
            ours, least = by_turns(400, add, bare)
            seen[number] = show(f'add, {number:.0e} reservations on {resources} resources'.replace('e+0', 'e'), ours, least)
            assert number > 10**5 or world.service.check()['differences'] == 0
            cmres.close_store()
        print(f'{"":58} growth from 1e3 to 1e6: {seen[10**6] / seen[10**3]:.2f} x')


def bench_rest(folder: Path) -> None:
    """GET and POST over HTTP against a bare Bottle handler with one read or one commit, on the same server."""
    import bottle
    import http.client
    import waitress
    world = World(folder)
    fill(world, 10**4, 100)
    token = world.service.token_add('u', 'p', 'admin')['token']
    app = cmres.rest(world.service)
    app.route('/bare', 'GET', lambda: bottle.HTTPResponse(cmres.json_text(
        cmres.rows('SELECT * FROM reservation WHERE id = 77')[0]._asdict())))

    def bare_post():
        with cmres.transaction():
            cmres.db.execute_sql('INSERT INTO bare SELECT * FROM reservation WHERE id = 77')
        return bottle.HTTPResponse('{}')
    app.route('/bare', 'POST', bare_post)
    server = waitress.create_server(app, host='127.0.0.1', port=0, threads=8, asyncore_use_poll=True)
    threading.Thread(target=server.run, daemon=True).start()
    connection = http.client.HTTPConnection('127.0.0.1', server.effective_port)

    def ask(verb, path, body=None):
        connection.request(verb, path, json.dumps(body) if body else None, {'Authorization': f'Bearer {token}'})
        answer = connection.getresponse()
        assert answer.status < 300, answer.read()
        answer.read()
    start = NOON + hours(999)
    show('GET one reservation over HTTP', *by_turns(
        400, lambda turn: ask('GET', f'{cmres.BASE}/reservation/r{9000 + turn % 900}'), lambda turn: ask('GET', '/bare')))
    show('POST a reservation over HTTP', *by_turns(
        400, lambda turn: ask('POST', f'{cmres.BASE}/reservation/', {
            'label': f'x{turn}', 'resource': f'place-{turn % 100}', 'start': cmres.to_plain(start), 'end': '+2h'}),
        lambda turn: ask('POST', '/bare')))
    server.close()
    cmres.close_store()


def bench_start(folder: Path) -> None:
    environment = os.environ | {'CMRES_DATABASE': str(folder / 'cmres.db')}

    def run(*words):
        return lambda turn: subprocess.run([sys.executable, *words], env=environment, check=True, stdout=subprocess.DEVNULL)
    show('start-up of `cmres.py list`', *by_turns(15, run(str(MODULE), 'list'), run('-c', 'pass')))


def bench() -> None:
    """All benchmarks, or those whose names are given."""
    import tempfile
    for name in sys.argv[1:] or ['start', 'rest', 'add']:
        with tempfile.TemporaryDirectory() as folder:
            globals()[f'bench_{name}'](Path(folder))


if __name__ == '__main__':
    bench()
