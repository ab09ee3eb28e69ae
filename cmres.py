#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "bottle~=0.13.4",          # REST: routes, requests, responses
#   "fire~=0.7.1",             # command line: commands and help out of functions
#   "openstacksdk>=4.4,<5",    # clouds: sessions, clouds.yaml, Nova, Glance, Neutron
#   "peewee~=4.5.3",           # store: models, transactions, one connection a thread
#   "pyyaml~=6.0",             # YAML files of reservations, YAML answers
#   "rich>=13,<16",            # tables and progress bars for people
#   "schedule~=1.2.2",         # heartbeat of the life cycle
#   "tzdata>=2025.2",          # time zones, where the system has none
#   "waitress~=3.0.2",         # HTTP server: slow clients hold no thread
# ]
# ///
"""cmres: reservations for virtual machines on OpenStack clouds.

A reservation promises capacity from FROM to TO, and cmres boots its machines at FROM and removes
them at TO. One file, SQLite, no other service:

  python cmres.py serve                        REST and life cycle on http://127.0.0.1:8080
  python cmres.py add lab demo +10s +1h --vms 3 --flavor m1.small --image cirros
  python cmres.py list

The words, used everywhere in one sense:

  resource     a place with a capacity: what its cell, cloud, region, aggregate holds at most
  reservation  what somebody asked for, under a label: a resource, machines, a window of time
  occurrence   one interval of a reservation; it holds capacity and has its own state and servers
  state        reserved, starting, active, degraded, ending, ended, cancelled or failed
  server       one virtual machine that a cloud made for an occurrence
  usage        how much of a resource is held at each instant: a step function of time
  event        one line of the journal: when, who, what, to which reservation, why

The file reads from top to bottom; a section uses only the sections above it:

  Errors, Time, Config, Calls         sentences, instants, settings, text that becomes arguments
  Store, Capacity                     what is on disk; the rule that admits
  Clouds, Service                     what boots machines; what people ask for
  Notices, Life cycle                 who is told; what makes it so
  REST, Client, Command line          three faces of the service, derived from its signatures
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import getpass
import hashlib
import inspect
import io
import json
import logging
import os
import queue
import random
import re
import secrets
import signal
import socket
import sqlite3
import sys
import textwrap
import threading
import time
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Iterable, Iterator, NamedTuple, NewType
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import peewee

# What only some commands need is imported where it is needed: bottle, fire, openstack, rich,
# schedule, waitress and yaml together cost thirty times as much as `list` itself.

__version__ = '0.1'

log = logging.getLogger('cmres')


# Errors ######################################################################
#
# Whoever raises one of these has written the sentence that the user will read. Only the REST
# wrapper makes a status of it, only `main` an exit code.


class Error(Exception):
    """What could not be done and what would be right, in one sentence; `details` says more to programs."""
    status = 500

    def __init__(self, sentence: str, **details):
        super().__init__(sentence)
        self.details = details


class Invalid(Error): status = 400       # noqa: E701
class Unauthorized(Error): status = 401  # noqa: E701
class Forbidden(Error): status = 403     # noqa: E701
class NotFound(Error): status = 404      # noqa: E701
class Conflict(Error): status = 409      # noqa: E701
class TooLarge(Error): status = 413      # noqa: E701
class NoCapacity(Conflict): pass         # noqa: E701
class Unavailable(Error): status = 503   # noqa: E701


class CloudError(Error):
    """A cloud refused or did not answer; `sure` when it certainly made or changed nothing."""
    status = 502

    def __init__(self, sentence: str, sure: bool = False, **details):
        super().__init__(sentence, **details)
        self.sure = sure

    @property
    def ill(self) -> bool:
        """Whether the cloud itself is in trouble, rather than this one request."""
        status = self.details.get('status', 0)
        return status in (0, 401, 408, 429) or status >= 500


ERRORS = {kind.__name__: kind for kind in (
    Error, Invalid, Unauthorized, Forbidden, NotFound, Conflict, TooLarge, NoCapacity, Unavailable, CloudError)}


def nearest(word: str, words: Iterable[str]) -> str:
    """The hint to append to a sentence that refuses `word`: '' or '; did you mean ...?'."""
    found = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean '{found[0]}'?" if found else ''


def shown(value) -> str:
    """A value as a sentence quotes it: short, on one line."""
    return textwrap.shorten(json.dumps(value, ensure_ascii=False, default=str), 60, placeholder='...')


# Time ########################################################################
#
# Promised instants are whole seconds since 1970 in the store and aware datetimes in Python;
# measured ones keep their fraction. Text is read and written at the edges only.

UTC = timezone.utc
FIRST, LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
DURATION = re.compile(r'\+?(?:(\d{1,4})w)?(?:(\d{1,5})d)?(?:(\d{1,6})h)?(?:(\d{1,8})m)?(?:(\d{1,10})s)?', re.I | re.A)
ISO_DURATION = re.compile(
    r'P(?:(\d{1,4})W)?(?:(\d{1,5})D)?(?:T(?:(\d{1,6})H)?(?:(\d{1,8})M)?(?:(\d{1,10})S)?)?', re.I | re.A)
# An offset's + that an unescaped query made a space.
LOST_PLUS = re.compile(r'(:\d\d) (\d\d:?\d\d)$')


def instant(seconds: float | None) -> datetime | None:
    """The aware UTC datetime of seconds since 1970."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def read_zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):
        raise Invalid(f"unknown time zone '{name}'; write one such as Europe/Paris or UTC") from None


def parse_time(text: str, zone: ZoneInfo, now: datetime) -> datetime:
    """The instant that a person typed, in UTC and whole seconds.

    Args:
      text: ISO 8601 with or without offset, with `/` for `-` or a space for `T`; `now`; or `+2h`, from now
      zone: the zone of a time without an offset

    Raises:
      ValueError: it is none of these, or outside the years 1970 to 2199.
    """
    word = LOST_PLUS.sub(r'\1+\2', text.strip())
    if word == 'now':
        return now
    if word.startswith('+'):
        return now + parse_duration(word)
    try:
        if not re.fullmatch('[0-9:TWZ+ .,/-]+', word):  # Python takes any letter between date and time
            raise ValueError
        moment = datetime.fromisoformat(word.replace('/', '-'))
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"'{text}' is not a time; write 2026-12-01T09:00, now or +2h") from None
    if not FIRST <= moment < LAST:
        raise ValueError(f"'{text}' is not between the years 1970 and 2199")
    return moment.replace(microsecond=0)


def parse_duration(text: str) -> timedelta:
    """The length that a person typed: 2h, +1d12h, 90m or PT2H; ValueError if it is none."""
    match = DURATION.fullmatch(text.strip()) or ISO_DURATION.fullmatch(text.strip())
    if not match or not any(match.groups()):
        raise ValueError(f"'{text}' is not a duration; write 2h, 1d12h, 90m or PT2H")
    weeks, days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    length = timedelta(weeks=weeks, days=days, hours=hours, minutes=minutes, seconds=seconds)
    if length > LAST - FIRST:
        raise ValueError(f"'{text}' is longer than {(LAST - FIRST).days} days")
    return length


def format_time(moment: datetime, zone: ZoneInfo) -> str:
    """A time for people: 2026-12-01 09:00 CET; seconds only where they are not zero."""
    local = moment.astimezone(zone)
    clock = '%H:%M:%S' if local.second else '%H:%M'
    return local.strftime(f'%Y-%m-%d {clock} %Z')


def format_duration(length: float) -> str:
    """Seconds for people: 1d2h30m; parse_duration reads it back."""
    parts = []
    for unit, seconds in (('d', 86400), ('h', 3600), ('m', 60), ('s', 1)):
        parts.append((int(length // seconds), unit))
        length %= seconds
    return ''.join(f'{number}{unit}' for number, unit in parts if number) or '0s'


# Config ######################################################################
#
# A setting comes from its environment twin (CMRES_PORT), else from the file, else it has the
# default below. The file is --config, else CMRES_CONFIG, else config.ini where there is one.


SECTIONS = ('cmres', 'credentials', 'texts')
#: What people are told of, and in which words: the first line is the subject.
TEXTS = {
    'added': '{label} is reserved\n{vms} vms on {resource} from {start} to {end}.',
    'refused': 'a reservation was refused\n{sentence}',
    'soon': '{label} starts at {start}\n{vms} vms on {resource} until {end}.',
    'ready': '{label} is ready\n{sentence}',
    'failed': '{label} failed\nIts window from {start} to {end} is over and it was {sentence}.',
    'ending': '{label} ends at {end}\nUntil then: extend {label} +1h. After that: {at_end}.',
    'ended': '{label} has ended\n{sentence}.',
    'kept': '{label} goes on until {end}\n{sentence}.',
    'released': '{label} was released\n{sentence}.',
}


def setting(default, why: str, least=None, most=10**9):
    return dataclasses.field(default=default, metadata={'why': why, 'least': least, 'most': most})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that can be set, once read never changed."""
    database: str = setting('cmres.db', 'the SQLite file that holds everything; not on a network file system')
    host: str = setting('127.0.0.1', 'the address that `serve` listens on; put a TLS proxy before any other')
    port: int = setting(8080, 'the port that `serve` listens on', 0, 65535)
    threads: int = setting(8, 'requests that are answered side by side', 1)
    url: str = setting('', 'a cmres server: with it, commands talk to that server and not to the database')
    token: str = setting('', 'the token for that server')
    timezone: str = setting('UTC', 'the zone of times typed without an offset, and of tables')
    workers: int = setting(32, 'calls to one cloud that run side by side', 1)
    call_timeout: float = setting(60.0, 'seconds after which a call to a cloud is given up', 0.1)
    boot_timeout: float = setting(900.0, 'seconds after which a server that does not come up is made anew', 0.1)
    settle: float = setting(15.0, 'seconds after a lost answer before a missing server is made again', 0.0)
    poll: float = setting(1.0, 'seconds between looks at servers that are coming or going', 0.01)
    sweep: float = setting(60.0, 'seconds between looks at servers that should just be there', 0.01)
    retry_first: float = setting(5.0, 'seconds before a failed boot or delete is tried again; doubles each time', 0.01)
    retry_most: float = setting(300.0, 'seconds that this pause grows to at most', 0.01)
    lease: float = setting(6.0, 'seconds after which another scheduler takes over from one that is silent', 0.1)
    notice: float = setting(600.0, 'seconds before a start and an end at which they are announced', 0.0)
    end_grace: float = setting(600.0, 'seconds after an end at which what is not stopped, shelved or saved goes', 0.0)
    webhook: str = setting('', 'an http(s) address that is told of every event that [texts] has words for')
    webhook_secret: str = setting('', 'the key of the HMAC-SHA256 that signs what webhooks are sent')
    private_addresses: bool = setting(False, 'whether webhooks may be in private networks and on this machine')
    mail_server: str = setting('', 'host:port of the SMTP server that takes notices; without one, no mail is sent')
    mail_from: str = setting('cmres@localhost', 'the sender of mails')
    orphan_grace: float = setting(60.0, 'age in seconds at which a server of ours that nothing wants is removed', 0.0)
    simulated_boot: float = setting(3.0, 'seconds that a boot takes on the cloud `simulated`', 0.0)
    simulated_failures: float = setting(0.0, 'share of boots that end in ERROR there, 0 to 1', 0.0, 1.0)
    simulated_vms: int = setting(0, 'servers that fit there; 0 means any number', 0)
    simulated_latency: float = setting(0.0, 'seconds that each call takes there', 0.0)
    credentials: dict = dataclasses.field(default_factory=dict)
    texts: dict = dataclasses.field(default_factory=TEXTS.copy)

    @property
    def zone(self) -> ZoneInfo:
        return read_zone(self.timezone)


SETTINGS = {field.name: field for field in dataclasses.fields(Config) if field.name not in SECTIONS}


def load_config(path: str | None = None, environ: dict = os.environ) -> Config:
    """Settings from the environment, a file and the defaults.

    Raises:
      Invalid: the file can't be read, a key is unknown or a value is of the wrong kind.
    """
    path = path or environ.get('CMRES_CONFIG') or ('config.ini' if os.path.exists('config.ini') else None)
    sections = read_config_file(path) if path else dict.fromkeys(SECTIONS, {})
    texts = dict(sections['cmres'])
    texts |= {name[6:].lower(): text for name, text in environ.items()
              if name.startswith('CMRES_') and name != 'CMRES_CONFIG'}
    for name in sections['texts']:
        if name not in TEXTS:
            raise Invalid(f"{path}: there is no event '{name}' to be told of{nearest(name, TEXTS)}")
    config = Config(**{name: read_setting(name, text) for name, text in texts.items()},
                    credentials=sections['credentials'], texts=TEXTS | sections['texts'])
    config.zone  # an unknown zone is refused here, not at the first table
    return config


def read_config_file(path: str) -> dict[str, dict]:
    """The texts of each section."""
    import configparser
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    try:
        with open(path, encoding='utf-8') as file:
            parser.read_file(file)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise Invalid(f"can't read the configuration '{path}': {str(error).splitlines()[0]}") from None
    for section in set(parser.sections()) - set(SECTIONS):
        raise Invalid(f'{path}: unknown section [{section}]{nearest(section, SECTIONS)}')
    return {name: dict(parser[name]) if parser.has_section(name) else {} for name in SECTIONS}


def read_bool(value, here=None) -> bool:
    words = {'true': True, 'yes': True, '1': True, 'false': False, 'no': False, '0': False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f'{shown(value)} is neither true nor false')


def read_setting(name: str, text: str):
    if name not in SETTINGS:
        raise Invalid(f"unknown setting '{name}'{nearest(name, SETTINGS)}")
    field = SETTINGS[name]
    try:
        value = read_bool(text) if isinstance(field.default, bool) else type(field.default)(text)
    except ValueError:
        what = 'neither true nor false' if isinstance(field.default, bool) else f'not a number such as {field.default}'
        raise Invalid(f"setting {name}: '{text}' is {what}") from None
    least, most = field.metadata['least'], field.metadata['most']
    if least is not None and not least <= value <= most:
        raise Invalid(f'setting {name}: {text} is not between {least} and {most}')
    return value


# Calls #######################################################################
#
# An operation is described once: by the signature of a method marked @api. Routes, commands,
# client methods, help and /openapi.json are derived from that mark, and `bind` is the one reader
# of arguments for all of them: the same mistake gives the same sentence everywhere.

Label = NewType('Label', str)      # a reservation's or a resource's own name
Place = NewType('Place', str)      # a resource's name, or - for one found by its place
Name = NewType('Name', str)        # somebody else's name: a user, a flavor, an image
Text = NewType('Text', str)        # free text, up to 64 KiB
File = NewType('File', str)        # text too; on the command line, the name of the file that holds it
Count = NewType('Count', int)      # 1 to a million
Page = NewType('Page', int)        # 1 to 10000 lines of a list
Most = NewType('Most', int)        # a capacity figure; `unlimited` is UNLIMITED
Span = NewType('Span', timedelta)  # a length of time
When = datetime | timedelta        # an instant, or a length from what comes before it
Names = NewType('Names', list)     # several names; text is split at commas
Pairs = NewType('Pairs', dict)     # names with values; text is k=v,k=v
Rows = NewType('Rows', list)       # many reservations; on the command line, a CSV, JSON or YAML file

UNLIMITED = -1
NO_LABELS = ('add', 'delete', '-', '.', '..')  # addresses read them in another sense
ANY = '-'  # for an argument that filters: anything, as if it were not given
FILTERS = {'label', 'user', 'project', 'resource', 'cell', 'cloud', 'region', 'aggregate', 'vms', 'start', 'end'}

#: What each argument means, in the one sense that it has in every operation.
WORDS = {
    'after': 'the earliest start, or in a list the id of the last line already seen',
    'aggregate': 'host aggregate of the resource',
    'at_end': 'what becomes of the machines at the end: delete, stop, shelve or snapshot (an image, then delete)',
    'before': 'the latest end',
    'by': 'how much longer, such as +1h',
    'cell': 'cell of the resource',
    'cloud': 'cloud of the resource: a name in clouds.yaml, or simulated',
    'count': 'how many; for a delete by filter, the number that it must hit',
    'description': 'free text for people',
    'dry_run': 'check and answer as if it were done, and keep nothing',
    'duration': 'length of the window, such as 2h, 1d12h or PT90M',
    'end': 'an instant, or a length from the start such as +2h',
    'flavor': 'flavor of the machines, by name or id; its vcpus and ram count',
    'force': 'do it although occurrences that are admitted already would no longer fit',
    'id': 'the id that the list shows',
    'image': 'image to boot, by name or id; without one, capacity is held and nothing boots',
    'key': 'key pair to put into the machines',
    'label': 'your own name for it: 1 to 64 letters, digits, . _ -',
    'lead': 'how long before the start the machines are booted; held as well',
    'limit': 'at most so many lines',
    'metadata': 'metadata of the machines: k=v,k=v',
    'name': 'name of the resource: 1 to 64 letters, digits, . _ -',
    'network': 'network of the machines, by name or id; else what the cloud chooses',
    'notify': 'mail addresses and http(s) addresses that are told what happens, with commas between',
    'partial': 'take the lines that fit, instead of all or nothing',
    'project': 'project that it belongs to',
    'ram': 'most MiB of memory; with none, or `unlimited`, no limit',
    'region': 'region of the resource',
    'rename': 'the new name',
    'resource': 'name of the resource, or - for one found by its place',
    'role': 'admin, user or reader',
    'rows': 'CSV, JSON or YAML with one reservation a line, fields named as in `add`',
    'security_groups': 'security groups of the machines, with commas between',
    'seed': 'the same seed gives the same reservations',
    'server': 'a machine that you have, by name or id, instead of an image: it is started and stopped, never deleted',
    'since': 'only what was planned from then on; without it, the last 30 days',
    'start': 'ISO 8601, now, or +2h from now; without an offset it is local time',
    'state': 'states, with commas between; without any, all that are not over',
    'until': 'an instant, or a length from the present end such as +2h',
    'user': 'user that it belongs to',
    'user_data': 'file that the machines are given for cloud-init',
    'vcpus': 'most vcpus; with none, or `unlimited`, no limit',
    'vms': 'number of machines',
}

REQUIRED = inspect.Parameter.empty
READER, USER, ADMIN = 'reader', 'user', 'admin'
ROLES = (READER, USER, ADMIN)  # each may do what those before it may


@dataclasses.dataclass
class Operation:
    """A published method: its routes `(verb, path, fixed arguments)`, who may call it, what it takes."""
    name: str
    method: Callable
    role: str
    routes: list

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        signature = inspect.signature(self.method, eval_str=True)
        return {name: each for name, each in signature.parameters.items() if name not in ('self', 'config')}

    @property
    def changes(self) -> bool:
        return self.routes[0][0] != 'GET'

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.method).splitlines()[0]


API: dict[str, Operation] = {}


def api(verb: str, path: str, role: str | None = None, **fixed):
    """Publishes a method; the topmost of several marks is the address that clients use.

    Args:
      role: the least role that may call it; reader for a GET, else user
      fixed: arguments that this address stands for
    """
    def publish(method):
        known = API.get(method.__name__)
        if known:
            known.routes.insert(0, (verb, path, fixed))
            return method
        API[method.__name__] = Operation(
            method.__name__, method, role or (READER if verb == 'GET' else USER), [(verb, path, fixed)])
        return guarded_by_role(method)
    return publish


def guarded_by_role(method):
    """Refuses an actor whose role is too small: the one place that looks at roles before a call."""
    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        needed = API[method.__name__].role
        if ROLES.index(self.actor.role) < ROLES.index(needed):
            raise Forbidden(f"{method.__name__.replace('_', ' ')} needs the role {needed}; "
                            f"{self.actor.user} is {self.actor.role}")
        return method(self, *args, **kwargs)
    return checked


class Here(NamedTuple):
    """Where and when arguments are read: the zone of bare times, and the instant that `now` means."""
    zone: ZoneInfo
    now: datetime


def bind(operation: Operation, given: dict, here: Here) -> dict:
    """The arguments of a call, read from text or JSON by the types of the method's signature.

    Raises:
      Invalid: one is unknown, missing or malformed; the sentence names it.
    """
    parameters = operation.parameters
    refuse_unknown(operation, given)
    anything = {name for name in FILTERS & given.keys()
                if given[name] == ANY and parameters[name].default is not REQUIRED}
    given = {name: value for name, value in given.items() if value is not None and name not in anything}
    missing = [name for name, each in parameters.items() if each.default is REQUIRED and name not in given]
    if missing:
        raise Invalid(f"{missing[0]} is missing: {WORDS[missing[0]]}")
    return {name: read_argument(name, value, parameters[name].annotation, here) for name, value in given.items()}


def refuse_unknown(operation: Operation, names: Iterable[str]) -> None:
    for name in names:
        if name not in operation.parameters:
            raise Invalid(f"{operation.name.replace('_', ' ')} has no argument '{name}'"
                          f'{nearest(name, operation.parameters)}')


def read_argument(name: str, value, kind, here: Here):
    try:
        return READERS[kind](value, here)
    except (ValueError, TypeError) as error:
        raise Invalid(f'{name}: {error}') from None


def read_str(value, here=None, most: int = 255) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{shown(value)} is not text')
    if len(value) > most:
        raise ValueError(f'at most {most} characters, not {len(value)}')
    if re.search('[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]', value):
        raise ValueError('control characters are not allowed')
    return value


def read_name(value, here=None) -> str:
    if re.search(r'[\n\t]', text := read_str(value)):
        raise ValueError('a name is one line')
    return text.strip()


def read_label(value, here=None) -> str:
    if re.fullmatch(r'[A-Za-z0-9._-]{1,64}', text := read_str(value)) and text not in NO_LABELS:
        return text
    raise ValueError(f"{shown(text)} is not a name of 1 to 64 letters, digits, '.', '_', '-' "
                     f"(nor {', '.join(NO_LABELS)})")


def read_place(value, here=None) -> str:
    return value if value == ANY else read_label(value)


def read_text(value, here=None) -> str:
    return read_str(value.replace('\r\n', '\n') if isinstance(value, str) else value, most=65535)


def read_file(value, here=None) -> str:
    """Nova takes 65535 bytes of user data in base64, that is 49149 before."""
    if len(read_text(value).encode()) > 49149:
        raise ValueError(f'at most 49149 bytes, not {len(value.encode())}')
    return read_text(value)


def read_int(value, here=None) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return value
    if isinstance(value, str) and re.fullmatch(r'[+-]?[0-9]{1,12}', value.strip()):
        return int(value)
    raise ValueError(f'{shown(value)} is not a whole number')


def read_count(value, here=None) -> int:
    if not 1 <= (number := read_int(value)) <= 1_000_000:
        raise ValueError(f'{number} is not between 1 and 1000000')
    return number


def read_page(value, here=None) -> int:
    if not 1 <= (number := read_int(value)) <= 10_000:
        raise ValueError(f'{number} is not between 1 and 10000')
    return number


def read_most(value, here=None) -> int:
    if value == 'unlimited':
        return UNLIMITED
    if not 0 <= (number := read_int(value)) <= 10**12:
        raise ValueError(f"{number} is not between 0 and 10^12, nor 'unlimited'")
    return number


def read_span(value, here=None) -> timedelta:
    return value if isinstance(value, timedelta) else parse_duration(read_str(value))


def read_when(value, here: Here):
    if isinstance(value, timedelta) or isinstance(value, datetime) and value.tzinfo:
        return value
    if isinstance(value, datetime):
        return value.replace(tzinfo=here.zone)
    text = read_str(value).strip()
    return parse_duration(text) if text[:1] in '+P' and text else parse_time(text, here.zone, here.now)


def read_names(value, here=None) -> list[str]:
    items = value.split(',') if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or len(items) > 100:
        raise ValueError(f'{shown(value)} is not a list of at most 100 names')
    return [name for name in map(read_name, items) if name]


def read_pairs(value, here=None) -> dict[str, str]:
    """Nova's metadata: at most 128 pairs, names and values of up to 255 characters."""
    pairs = value
    if isinstance(value, str):
        pairs = dict(pair.split('=', 1) if '=' in pair else (pair, None) for pair in value.split(',') if pair)
    if not isinstance(pairs, dict) or len(pairs) > 128 or not all(isinstance(each, str) for each in pairs.values()):
        raise ValueError(f'{shown(value)} is not k=v,k=v with at most 128 pairs')
    for name in pairs:
        if not re.fullmatch('[a-zA-Z0-9_:. -]{1,255}', name):
            raise ValueError(f'{shown(name)} is not a name of 1 to 255 letters, digits, spaces, - _ : .')
    return {name: read_str(each) for name, each in pairs.items()}


def read_rows(value, here=None) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError('a list of reservations is needed, each an object with fields as in `add`')
    if not all(type(row.get('line', 0)) is int for row in value):
        raise ValueError('the line of a reservation is a whole number')
    if not 0 < len(value) <= 100_000:
        raise ValueError(f'1 to 100000 reservations at a time, not {len(value)}')
    return value


READERS = {
    str: read_str, int: read_int, bool: read_bool, Label: read_label, Place: read_place, Name: read_name,
    Text: read_text, File: read_file, Count: read_count, Page: read_page, Most: read_most, Span: read_span,
    When: read_when, Names: read_names, Pairs: read_pairs, Rows: read_rows}


#: The fields that hold instants, wherever they appear.
INSTANTS = frozenset(
    'added at begun cancelled changed deleted end next_start planned ready revoked start until'.split())


def to_plain(value):
    """An answer as JSON has it: instants in ISO 8601 and UTC, lengths in ISO 8601."""
    if isinstance(value, dict):
        return {name: to_plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat(timespec='milliseconds' if value.microsecond else 'seconds')
    return f'PT{int(value.total_seconds())}S' if isinstance(value, timedelta) else value


def from_plain(value):
    """What to_plain was given: the client's answers are equal to the service's."""
    if isinstance(value, dict):
        return {name: each if name == 'metadata' else datetime.fromisoformat(each)
                if name in INSTANTS and isinstance(each, str) else from_plain(each) for name, each in value.items()}
    return [from_plain(each) for each in value] if isinstance(value, list) else value


# Store #######################################################################
#
# peewee's models say what is on disk. Everything that is read or written at every request goes
# through a few functions over plain SQL (building peewee's SQL costs ten times what SQLite needs
# to run it). There is one idiom for writing: `with transaction():`, IMMEDIATE, so that what is
# read in it can't change before it ends. Nothing remote is ever called inside.

PATIENT = 30  # seconds that a writer waits for others
OURS = 0x636d7265  # the application id of our databases: 'cmre'

db = peewee.SqliteDatabase(None, lock_type='IMMEDIATE', pragmas={
    'journal_mode': 'wal', 'synchronous': 'full', 'foreign_keys': 1, 'cache_size': -32_000})

# SQLite's busy handler is unfair: writers of one process queue here, those of others there.
write_lock = threading.RLock()


class Table(peewee.Model):
    class Meta:
        database = db
        legacy_table_names = False


class Resource(Table):
    name = peewee.CharField()
    cell = peewee.CharField()
    cloud = peewee.CharField()
    region = peewee.CharField()
    aggregate = peewee.CharField()
    vms = peewee.IntegerField(null=True)  # NULL in these three is unlimited
    vcpus = peewee.IntegerField(null=True)
    ram = peewee.IntegerField(null=True)  # MiB
    added = peewee.IntegerField()
    removed = peewee.IntegerField(null=True)


Resource.add_index(Resource.index(Resource.name, unique=True, where=Resource.removed.is_null()))


class Reservation(Table):
    label = peewee.CharField()
    user = peewee.CharField()
    project = peewee.CharField()
    flavor = peewee.CharField()
    image = peewee.CharField()  # '' boots nothing
    network = peewee.CharField()
    key = peewee.CharField()
    security_groups = peewee.TextField()  # JSON
    user_data = peewee.TextField()
    metadata = peewee.TextField()  # JSON
    server = peewee.CharField()  # the id of a machine that its owner has already, in place of an image
    at_end = peewee.CharField()  # '' or one of ENDS
    notify = peewee.TextField()  # JSON
    lead = peewee.IntegerField()  # seconds
    description = peewee.TextField()
    added = peewee.IntegerField()
    changed = peewee.IntegerField()
    over = peewee.IntegerField()  # from then on its label is free again

    class Meta:
        indexes = ((('project', 'label', 'over'), False),)


class Occurrence(Table):
    reservation = peewee.ForeignKeyField(Reservation)
    resource = peewee.ForeignKeyField(Resource, index=False)
    start = peewee.IntegerField()
    end = peewee.IntegerField()
    held_from = peewee.IntegerField()   # start - lead
    held_until = peewee.IntegerField()  # end, or earlier when it was cancelled
    vms = peewee.IntegerField()
    vcpus = peewee.IntegerField()  # of all its machines
    ram = peewee.IntegerField()    # of all its machines, MiB
    cancelled = peewee.IntegerField(null=True)
    told = peewee.IntegerField(default=0)  # which of SOON, READY, ENDING were announced
    due = peewee.DoubleField(null=True)  # when the life cycle must look at it next; NULL: never again

    class Meta:
        constraints = [peewee.Check('held_from <= start AND start < "end" AND held_until <= "end"')]


LIVE = Occurrence.due.is_null(False)  # partial indexes on it leave history out
Occurrence.add_index(Occurrence.index(Occurrence.due, where=LIVE, name='occurrence_due'))
Occurrence.add_index(Occurrence.index(Occurrence.start, where=LIVE, name='occurrence_live'))
Occurrence.add_index(Occurrence.index(Occurrence.resource, Occurrence.start, where=LIVE, name='occurrence_held'))


class Step(Table):
    """Of `resource`, this much is held from `at` until the next step."""
    resource = peewee.ForeignKeyField(Resource, index=False)
    at = peewee.IntegerField()
    vms = peewee.IntegerField()
    vcpus = peewee.IntegerField()
    ram = peewee.IntegerField()

    class Meta:
        primary_key = peewee.CompositeKey('resource', 'at')
        without_rowid = True


class Server(Table):
    occurrence = peewee.ForeignKeyField(Occurrence)
    n = peewee.IntegerField()
    name = peewee.CharField()
    account = peewee.CharField()       # the entry of clouds.yaml that it is made with
    goal = peewee.CharField()          # up, then what becomes of it: one of ENDS
    state = peewee.CharField()         # planned, then Nova's status in lower case or one of UNDER_WAY, at last FINAL
    borrowed = peewee.BooleanField()   # it was there before, and will be after: never made, never deleted
    tries = peewee.IntegerField()      # creates begun so far: part of the mark, so that none is used twice
    failures = peewee.IntegerField()   # in a row; the pause grows with them
    uid = peewee.CharField(null=True)  # the cloud's id, once an answer or a look told it
    addresses = peewee.TextField()     # JSON
    snapshot = peewee.CharField()      # the name of the image that was made of it
    snapshot_id = peewee.CharField()
    fault = peewee.TextField()
    planned = peewee.DoubleField()
    begun = peewee.DoubleField(null=True)
    ready = peewee.DoubleField(null=True)
    deleted = peewee.DoubleField(null=True)
    called = peewee.DoubleField(null=True)  # when the last call for it was intended, and then when it ended
    due = peewee.DoubleField(null=True)


Server.add_index(Server.index(Server.due, where=Server.due.is_null(False), name='server_due'))


class Token(Table):
    user = peewee.CharField()
    project = peewee.CharField()
    role = peewee.CharField()
    hash = peewee.CharField(unique=True)
    added = peewee.IntegerField()
    revoked = peewee.IntegerField(null=True)


class Event(Table):
    at = peewee.DoubleField()
    actor = peewee.CharField()
    code = peewee.CharField()
    sentence = peewee.TextField()
    reservation = peewee.ForeignKeyField(Reservation, null=True)


class Outbox(Table):
    """A notice on its way: sent when it is written down with its event, until it has arrived."""
    event = peewee.ForeignKeyField(Event, index=False)
    target = peewee.CharField()
    tries = peewee.IntegerField(default=0)
    due = peewee.DoubleField(null=True)  # NULL: it has arrived, or was given up
    fault = peewee.TextField(default='')


Outbox.add_index(Outbox.index(Outbox.due, where=Outbox.due.is_null(False), name='outbox_due'))


class Lease(Table):
    """Who may act for the life cycle, and until when unless they say so again."""
    name = peewee.CharField(primary_key=True)
    holder = peewee.CharField()
    until = peewee.DoubleField()


class Fact(Table):
    """What this store knows of itself."""
    name = peewee.CharField(primary_key=True)
    value = peewee.CharField()


class SimulatedServer(Table):
    """The cloud `simulated` keeps its servers here; nothing but Simulated reads it."""
    account = peewee.CharField()
    uid = peewee.CharField(unique=True)
    name = peewee.CharField()
    mark = peewee.CharField()
    made = peewee.DoubleField()
    boots = peewee.DoubleField()  # seconds that its boot takes
    power = peewee.CharField(default='active')
    saved = peewee.DoubleField(null=True)  # when the image of it is complete
    fault = peewee.TextField()
    gone = peewee.DoubleField(null=True)


TABLES = [Resource, Reservation, Occurrence, Step, Server, Token, Event, Outbox, Lease, Fact, SimulatedServer]

#: What brings an older store up to the models above, one function a version.
MIGRATIONS: list[Callable] = []


def open_store(path: str) -> None:
    """Opens the database, makes or migrates its tables; every thread then has its own connection.

    Raises:
      Unavailable: the file can't be opened, or a newer cmres wrote it.
    """
    close_store()
    if not path:
        raise Invalid('setting database: a file name is needed, such as cmres.db')
    db.init(path, timeout=PATIENT)
    try:
        if db.application_id != OURS and db.get_tables():
            raise Unavailable(f"'{path}' is a database of something else; name another file")
        if db.user_version != len(MIGRATIONS) + 1:
            migrate()
    except peewee.DatabaseError as error:
        raise Unavailable(f"can't open the database '{path}': {error}") from None


def close_store() -> None:
    if not db.deferred and not db.is_closed():
        db.close()


def migrate() -> None:
    with transaction():
        version = db.user_version
        if version > len(MIGRATIONS) + 1:
            raise Unavailable(f'a newer cmres wrote this database (version {version}); use that one')
        if version == 0:
            db.create_tables(TABLES)
            insert(Fact, name='store', value=secrets.token_hex(4))
        for step in MIGRATIONS[max(version - 1, 0):] if version else ():
            step()
        db.user_version, db.application_id = len(MIGRATIONS) + 1, OURS


@contextmanager
def transaction(keep: bool = True) -> Iterator[None]:
    """All of it or nothing, on disk when it ends; alone in this process; without `keep`, undone at its end."""
    if not write_lock.acquire(timeout=PATIENT):
        raise Unavailable(f'others have been writing for {PATIENT} seconds; try again')
    try:
        with db.atomic() as current:
            yield
            if not keep:
                current.rollback()
    finally:
        write_lock.release()


def run(sql: str, *values) -> sqlite3.Cursor:
    """Runs one statement on this thread's connection; peewee's kinds of errors, without its cost."""
    try:
        return db.connection().execute(sql, values)
    except sqlite3.Error as error:
        raise getattr(peewee, type(error).__name__)(*error.args) from error


def rows(sql: str, *values) -> list:
    """All rows of a query, as named tuples."""
    cursor = run(sql, *values)
    return list(map((ROW_TYPES.get(sql) or row_type(sql, cursor))._make, cursor))


def row(sql: str, *values):
    """The first row of a query, or None."""
    found = rows(sql, *values)
    return found[0] if found else None


ROW_TYPES: dict = {}


def row_type(sql: str, cursor):
    if len(ROW_TYPES) > 500:  # queries with lists of filters come in many forms
        ROW_TYPES.clear()
    ROW_TYPES[sql] = namedtuple('Row', [column[0] for column in cursor.description])
    return ROW_TYPES[sql]


def insert(model: type[Table], **values) -> int:
    """Writes a row and tells its id."""
    return run(insert_text(model, tuple(values)), *values.values()).lastrowid


@functools.lru_cache
def insert_text(model, names: tuple) -> str:
    columns = ', '.join(f'"{model._meta.fields[name].column_name}"' for name in names)
    return f"INSERT INTO {model._meta.table_name} ({columns}) VALUES ({', '.join('?' * len(names))})"


def change(model: type[Table], id: int, **values) -> None:
    """Writes some columns of one row."""
    run(change_text(model, tuple(values)), *values.values(), id)


@functools.lru_cache
def change_text(model, names: tuple) -> str:
    columns = ', '.join(f'"{model._meta.fields[name].column_name}" = ?' for name in names)
    return f'UPDATE {model._meta.table_name} SET {columns} WHERE id = ?'


def journal(config: Config, at: float, actor: str, code: str, sentence: str, reservation: int | None = None,
            notify: Iterable[str] = ()) -> None:
    """Appends an event, and the notices of it; inside the transaction of what it tells."""
    event = insert(Event, at=at, actor=actor, code=code, sentence=sentence, reservation=reservation)
    for target in [config.webhook, *notify] if code in TEXTS else ():
        if target:
            insert(Outbox, event=event, target=target, due=at, tries=0, fault='')


# What a reservation looks like to everybody: its occurrence's facts and the state derived from
# them. A state is never stored, so it can't be stale: it follows from the clock and from what was
# seen of the servers. The parameter is the instant for which the state is asked.

LISTING = '''
  SELECT o.id, r.id AS reservation, r.label, r.user, r.project,
         s.name AS resource, s.cell, s.cloud, s.region, s.aggregate,
         o.vms, r.flavor, r.image, r.network, r.key, r.security_groups, r.metadata, r.user_data,
         r.server, r.at_end, r.notify, o.vcpus, o.ram, r.lead, r.description, o.start, o."end", o.cancelled,
         r.added, r.changed,
         (SELECT count(*) FROM server v
           WHERE v.occurrence_id = o.id AND v.goal = 'up' AND v.state = 'active') AS up,
         (SELECT v.fault FROM server v WHERE v.occurrence_id = o.id AND v.goal = 'up' AND v.fault <> ''
           ORDER BY v.n LIMIT 1) AS fault,
         (SELECT count(*) FROM server v
           WHERE v.occurrence_id = o.id AND v.state NOT IN ('deleted', 'kept')) AS existing,
         (SELECT count(*) FROM server v WHERE v.occurrence_id = o.id AND v.ready IS NOT NULL) AS ever,
         (r.image <> '' OR r.server <> '') AS runs,
         clock.now, o.told, o.held_from, o.held_until, o.resource_id, r.over, o.due
    FROM (SELECT CAST(? AS INTEGER) AS now) clock, occurrence o
    JOIN reservation r ON r.id = o.reservation_id JOIN resource s ON s.id = o.resource_id'''

STATE = '''
  CASE WHEN cancelled IS NOT NULL THEN CASE WHEN existing > 0 THEN 'ending' ELSE 'cancelled' END
       WHEN now < held_from OR NOT runs AND now < start THEN 'reserved'
       WHEN NOT runs THEN CASE WHEN now < "end" THEN 'active' ELSE 'ended' END
       WHEN now >= "end" THEN CASE WHEN existing > 0 THEN 'ending' WHEN ever > 0 THEN 'ended' ELSE 'failed' END
       WHEN up >= vms THEN 'active' WHEN up > 0 THEN 'degraded' ELSE 'starting' END'''

STATES = ('waiting', 'pending', 'reserved', 'starting', 'active', 'degraded', 'ending', 'ended', 'cancelled', 'failed')


def listing(now: float, where: str = '1', values: tuple = (), state: str = '1', tail: str = '') -> list:
    """Occurrences with their reservation and state, by conditions on o, r and s and then on the state."""
    return rows(f'SELECT * FROM (SELECT *, {STATE} AS state FROM ({LISTING} WHERE {where})) WHERE {state} {tail}',
                int(now), *values)


# Capacity ####################################################################
#
# THE RULE. An occurrence holds an amount (vms, vcpus, ram) of its resource during the half-open
# window [held_from, held_until). It is admitted if, at every instant of that window, what is held
# already plus what it asks for stays within the resource's capacity.
#
# The sum that is held is a step function of time. Table `step` keeps it, canonical: a row where
# the level changes and nowhere else; before the first row nothing is held. It changes in the same
# transaction as the occurrence, so these hold at every commit:
#
#   (1) the level at t is the row with the greatest `at` <= t;
#   (2) the peak of a window is the greatest level among the row at its beginning and those inside;
#   (3) holding cuts the function at both ends of the window, adds in between, and drops a cut
#       where the level doesn't change after all; releasing is holding the negative amount.
#
# Cost: a few index look-ups and one row per change of level inside the window, whatever the number
# of reservations. `check` derives the same function from the occurrences and compares.

class Amount(NamedTuple):
    """Something held or asked for; also a level, and with None for unlimited a capacity."""
    vms: int = 0
    vcpus: int = 0
    ram: int = 0

    def __add__(self, other): return Amount(*(a + b for a, b in zip(self, other)))

    def __sub__(self, other): return Amount(*(a - b for a, b in zip(self, other)))

    def __mul__(self, factor: int): return Amount(*(each * factor for each in self))

    def within(self, capacity) -> bool:
        return all(most is None or each <= most for each, most in zip(self, capacity))


NOTHING = Amount()


def level(resource: int, at: float) -> Amount:
    """(1)"""
    found = run('SELECT vms, vcpus, ram FROM step WHERE resource_id = ? AND at <= ? '
                'ORDER BY at DESC LIMIT 1', resource, at).fetchone()
    return Amount(*found) if found else NOTHING


def peak(resource: int, begin: float, until: float) -> Amount:
    """(2), each figure on its own."""
    inside = run('SELECT max(vms), max(vcpus), max(ram) FROM step '
                 'WHERE resource_id = ? AND at > ? AND at < ?', resource, begin, until).fetchone()
    return Amount(*(max(a, b or 0) for a, b in zip(level(resource, begin), inside)))


def hold(resource: int, begin: int, until: int, amount: Amount) -> None:
    """(3), without asking whether it fits."""
    if begin >= until or amount == NOTHING:
        return
    there_before = [at for at in (begin, until) if not cut(resource, at)]
    run('UPDATE step SET vms = vms + ?, vcpus = vcpus + ?, ram = ram + ? '
        'WHERE resource_id = ? AND at >= ? AND at < ?', *amount, resource, begin, until)
    for at in there_before:  # a new cut is a change of level for sure
        if level(resource, at) == level(resource, at - 1):
            run('DELETE FROM step WHERE resource_id = ? AND at = ?', resource, at)


def cut(resource: int, at: int) -> bool:
    """Makes sure that there is a row at an instant; whether it is new."""
    return run('INSERT INTO step (resource_id, at, vms, vcpus, ram) VALUES (?, ?, ?, ?, ?) '
               'ON CONFLICT DO NOTHING', resource, at, *level(resource, at)).rowcount > 0


def release(resource: int, begin: int, until: int, amount: Amount) -> None:
    hold(resource, begin, until, NOTHING - amount)


def fits(resource, begin: float, until: float, amount: Amount) -> bool:
    """Whether a resource row has room for an amount during all of a window."""
    return (peak(resource.id, begin, until) + amount).within(capacity(resource))


def capacity(resource) -> Amount:
    return Amount(resource.vms, resource.vcpus, resource.ram)


def admit(resource, begin: int, until: int, amount: Amount, now: float) -> None:
    """Holds an amount if it fits from now on (the past is no obstacle), by THE RULE.

    Raises:
      NoCapacity: it doesn't; nothing was changed.
    """
    if not fits(resource, max(begin, int(now)), until, amount):
        raise NoCapacity('')
    hold(resource.id, begin, until, amount)


def steps(resource: int, begin: float, until: float) -> Iterator[tuple[float, Amount]]:
    """The step function in a window: (instant, level from then on), the first at its beginning."""
    yield begin, level(resource, begin)
    for at, *held in run('SELECT at, vms, vcpus, ram FROM step WHERE resource_id = ? '
                         'AND at > ? AND at < ? ORDER BY at', resource, begin, until):
        yield at, Amount(*held)


def free_windows(resource, amount: Amount, after: float, before: float) -> Iterator[tuple[float, float]]:
    """The longest windows [begin, until) within [after, before) in which an amount fits, earliest first."""
    begin = after if (level(resource.id, after) + amount).within(capacity(resource)) else None
    at = after
    while at < before:
        at = next_step(resource, amount, at, before, free=begin is None)
        if begin is not None:
            yield begin, at
        begin = at if begin is None else None


def next_step(resource, amount: Amount, after: float, before: float, free: bool) -> float:
    """The first step in (after, before) at which an amount fits, or with `free` false doesn't; else `before`."""
    rooms = [2**62 if most is None else most - need for most, need in zip(capacity(resource), amount)]
    fits_or_not = '' if free else 'NOT'
    found = run(f'SELECT at FROM step WHERE resource_id = ? AND at > ? AND at < ? AND {fits_or_not} '
                '(vms <= ? AND vcpus <= ? AND ram <= ?) ORDER BY at LIMIT 1',
                resource.id, after, before, *rooms).fetchone()
    return found[0] if found else before


def held_steps(resource: int) -> Iterator[tuple[int, Amount]]:
    """The step function as the occurrences give it, canonical: what table `step` must hold."""
    changes = defaultdict(lambda: NOTHING)
    for begin, until, *amount in run('SELECT held_from, held_until, vms, vcpus, ram FROM occurrence '
                                     'WHERE resource_id = ? AND held_from < held_until', resource):
        changes[begin] += Amount(*amount)
        changes[until] -= Amount(*amount)
    held = NOTHING
    for at in sorted(changes):
        if changes[at] != NOTHING:
            held += changes[at]
            yield at, held


# Clouds ######################################################################
#
# What a cloud must do for us: know names, boot one machine under a mark, list the servers that
# carry our marks, delete one. A mark is unique for each attempt to make a server and is set in the
# create call itself, so that a server whose answer was lost is found again.


class Machine(NamedTuple):
    """One machine to boot, in the words of the person who asked for it."""
    name: str
    mark: str
    flavor: str
    image: str
    network: str = ''
    key: str = ''
    security_groups: tuple = ()
    user_data: str = ''
    metadata: dict = {}


class Flavor(NamedTuple):
    """What one machine takes: vcpus and ram in MiB."""
    vcpus: int
    ram: int


class Seen(NamedTuple):
    """A server of ours as its cloud shows it: Nova's status in lower case, `made` in seconds since 1970."""
    uid: str
    mark: str
    state: str
    made: float
    fault: str = ''
    addresses: list = []


class Cloud:
    """One account on one cloud. Every verb may raise CloudError; none of them waits longer than the time-out."""

    def __init__(self, account: str):
        self.account = account

    def find(self, kind: str, name: str):
        """The flavor, image, network, key or security group of that name or id; None if there is none."""
        raise NotImplementedError

    def names(self, kind: str) -> list[str]:
        """The names there are of a kind."""
        raise NotImplementedError

    def boot(self, machine: Machine) -> str:
        """Begins to make one server and tells its id; unless CloudError is `sure`, it may exist all the same."""
        raise NotImplementedError

    def servers(self) -> list[Seen]:
        """All servers that carry this store's marks, in whatever state."""
        raise NotImplementedError

    def delete(self, uid: str) -> None:
        """Begins to delete a server; it is gone when servers() doesn't show it; one that is gone already is fine."""
        raise NotImplementedError

    def server(self, uid: str) -> Seen | None:
        """One server by its id, with our mark or without; None if it is not there."""
        raise NotImplementedError

    def start(self, uid: str) -> None:
        """Begins to start a server that is stopped or shelved."""
        raise NotImplementedError

    def stop(self, uid: str) -> None:
        """Begins to stop a server; it is SHUTOFF then."""
        raise NotImplementedError

    def shelve(self, uid: str) -> None:
        """Begins to shelve a server; it frees its host then."""
        raise NotImplementedError

    def snapshot(self, uid: str, name: str) -> str:
        """Begins to make an image of a server, unless there is one of that name, and tells the image's id."""
        raise NotImplementedError

    def saved(self, image: str) -> bool | None:
        """Whether an image is complete; None if it never will be."""
        raise NotImplementedError

    def check(self, named: Iterable[tuple[str, str]]) -> list:
        """What is found for (kind, name) pairs, in their order.

        Raises:
          Invalid: there is no such thing; the sentence names it, the cloud and the nearest name.
        """
        found = []
        for kind, name in named:
            thing = self.find(kind, name)
            if thing is None:
                raise Invalid(f"the cloud {self.account} has no {kind.replace('_', ' ')} '{name}'"
                              f"{nearest(name, self.names(kind))}")
            found.append(thing)
        return found


class OpenStack(Cloud):
    """An entry of clouds.yaml, through openstacksdk."""

    # In the SDK: service, the verb that finds one, the verb that lists all.
    KINDS = {'flavor': ('compute', 'find_flavor', 'flavors'), 'image': ('image', 'find_image', 'images'),
             'network': ('network', 'find_network', 'networks'), 'key': ('compute', 'find_keypair', 'keypairs'),
             'security_group': ('network', 'find_security_group', 'security_groups'),
             'server': ('compute', 'find_server', 'servers')}
    REMEMBER = 300  # seconds that a found name is taken for granted

    def __init__(self, account: str, store: str, timeout: float):
        super().__init__(account)
        self.store, self.timeout = store, timeout
        self.found: dict = {}
        self.lock = threading.Lock()
        self.session = None

    @property
    def connection(self):
        """One authenticated connection for all threads; one that failed is tried anew."""
        with self.lock, self.telling('be reached', sure=True):
            if self.session is None:
                import openstack
                session = openstack.connect(cloud=self.account, api_timeout=self.timeout, app_name='cmres')
                session.compute.get_endpoint_data()  # logs in, and negotiates versions before threads do
                self.session = session
            return self.session

    @contextmanager
    def telling(self, what: str, sure: bool = False):
        """Makes CloudError of whatever goes wrong between here and the cloud."""
        try:
            yield
        except Error:
            raise
        except Exception as error:  # the SDK's, keystoneauth's, requests', urllib3's and the parser's own kinds
            status = getattr(error, 'status_code', None) or getattr(error, 'http_status', None) or 0
            if status == 401:  # the operator may put a new credential into clouds.yaml
                self.session = None
            response = getattr(error, 'response', None)
            details = {'retry_after': response.headers.get('Retry-After')} if response is not None else {}
            text = getattr(error, 'details', None) or str(error) or type(error).__name__
            raise CloudError(f"the cloud {self.account} could not {what}: {textwrap.shorten(str(text), 300)}",
                             sure or 400 <= status < 500 and status != 408, status=status, **details) from error

    def find(self, kind, name):
        expires, thing = self.found.get((kind, name), (0, None))
        if time.monotonic() < expires:
            return thing
        service, verb, _ = self.KINDS[kind]
        with self.telling(f'find the {kind}', sure=True):
            thing = getattr(getattr(self.connection, service), verb)(name, ignore_missing=True)
        if thing is not None:
            thing = Flavor(thing.vcpus, thing.ram)._asdict() | {'id': thing.id} if kind == 'flavor' else thing.to_dict()
            self.found[kind, name] = time.monotonic() + self.REMEMBER, thing
        return thing

    def names(self, kind):
        service, _, verb = self.KINDS[kind]
        with self.telling(f'list each {kind}', sure=True):
            return [thing.name for thing in getattr(getattr(self.connection, service), verb)() if thing.name]

    def boot(self, machine):
        import base64
        named = [('flavor', machine.flavor), ('image', machine.image)]
        plain = machine.network or 'auto'
        if plain not in ('auto', 'none'):
            named.append(('network', plain))
        flavor, image, *network = (thing['id'] for thing in self.check(named))
        wish = {'name': machine.name, 'flavor_id': flavor, 'image_id': image, 'metadata': machine.metadata,
                'networks': [{'uuid': network[0]}] if network else plain, 'tags': [self.store, machine.mark]}
        if machine.key:
            wish['key_name'] = machine.key
        if machine.security_groups:
            wish['security_groups'] = [{'name': name} for name in machine.security_groups]
        if machine.user_data:
            wish['user_data'] = base64.b64encode(machine.user_data.encode()).decode()
        compute = self.connection.compute
        with self.telling('make a server'):
            return compute.create_server(**wish).id

    def servers(self):
        compute = self.connection.compute
        with self.telling('list servers', sure=True):
            return [self.seen(server) for server in compute.servers(tags=self.store)]

    def seen(self, server) -> Seen:
        mark = next((tag for tag in server.tags or () if tag.startswith(f'{self.store}-')), '')
        fault = server.fault.get('message', '') if isinstance(server.fault, dict) else ''
        addresses = [each['addr'] for each in sum((server.addresses or {}).values(), [])]
        made = datetime.fromisoformat(server.created_at).timestamp()
        return Seen(server.id, mark, (server.status or 'unknown').lower(), made, fault, addresses)

    def delete(self, uid):
        compute = self.connection.compute
        with self.telling('delete a server', sure=True):
            compute.delete_server(uid, ignore_missing=True)

    def server(self, uid):
        compute = self.connection.compute
        with self.telling('show a server', sure=True):
            found = compute.find_server(uid, ignore_missing=True)
            return self.seen(found) if found else None

    def start(self, uid):
        compute = self.connection.compute
        with self.telling('start a server', sure=True):
            how = {'PAUSED': compute.unpause_server, 'SUSPENDED': compute.resume_server,
                   'SHELVED': compute.unshelve_server, 'SHELVED_OFFLOADED': compute.unshelve_server}
            how.get(compute.get_server(uid).status, compute.start_server)(uid)

    def stop(self, uid):
        compute = self.connection.compute
        with self.telling('stop a server', sure=True):
            compute.stop_server(uid)

    def shelve(self, uid):
        compute = self.connection.compute
        with self.telling('shelve a server', sure=True):
            compute.shelve_server(uid)

    def snapshot(self, uid, name):
        compute = self.connection.compute
        with self.telling('make an image of a server', sure=True):
            made = self.connection.image.find_image(name, ignore_missing=True)  # by a call whose answer was lost
            return (made or compute.create_server_image(uid, name)).id

    def saved(self, image):
        connection = self.connection
        with self.telling('show an image', sure=True):
            found = connection.image.find_image(image, ignore_missing=True)
            gone = found is None or found.status in ('killed', 'deleted', 'pending_delete', 'deactivated')
            return None if gone else found.status == 'active'


class Simulated(Cloud):
    """A cloud inside the store, to see and test everything without one."""

    FLAVORS = {'m1.tiny': Flavor(1, 512), 'm1.small': Flavor(1, 2048), 'm1.medium': Flavor(2, 4096),
               'm1.large': Flavor(4, 8192), 'm1.xlarge': Flavor(8, 16384)}
    NAMES = {'flavor': FLAVORS, 'image': ('cirros', 'debian-12', 'ubuntu-24.04'), 'network': ('private', 'public'),
             'key': ('default',), 'security_group': ('default',)}

    def __init__(self, account: str, store: str, config: Config, clock: Callable[[], float]):
        super().__init__(account)
        self.store, self.config, self.clock = store, config, clock

    def find(self, kind, name):
        if kind == 'server':
            found = self.present().where((SimulatedServer.uid == name) | (SimulatedServer.name == name)).first()
            return {'id': found.uid} if found else None
        if name not in self.NAMES[kind]:
            return None
        return {'id': name} | (self.FLAVORS[name]._asdict() if kind == 'flavor' else {})

    def names(self, kind):
        return [each.name for each in self.present()] if kind == 'server' else list(self.NAMES[kind])

    def boot(self, machine):
        time.sleep(self.config.simulated_latency)
        self.check([('flavor', machine.flavor), ('image', machine.image)])
        uid = secrets.token_hex(8)
        with transaction():
            full = 0 < self.config.simulated_vms <= self.present().count()
            fault = 'No valid host was found.' if full or random.random() < self.config.simulated_failures else ''
            insert(SimulatedServer, account=self.account, uid=uid, name=machine.name, mark=machine.mark,
                   made=self.clock(), boots=self.config.simulated_boot, power='active', fault=fault)
        return uid

    def present(self):
        return SimulatedServer.select().where(SimulatedServer.account == self.account, SimulatedServer.gone.is_null())

    def servers(self):
        time.sleep(self.config.simulated_latency)
        ours = SimulatedServer.mark.startswith(self.store)
        return [self.seen(server) for server in self.present().where(ours).order_by(SimulatedServer.id)]

    def server(self, uid):
        found = self.present().where(SimulatedServer.uid == uid).first()
        return self.seen(found) if found else None

    def seen(self, server) -> Seen:
        up = self.clock() >= server.made + server.boots
        state = 'build' if not up else 'error' if server.fault else server.power
        address = f'10.0.{server.id // 250 % 250}.{server.id % 250 + 1}'
        return Seen(server.uid, server.mark, state, server.made, server.fault if up else '', [address] if up else [])

    def delete(self, uid):
        self.set(uid, gone=self.clock())

    def set(self, uid: str, **values) -> None:
        time.sleep(self.config.simulated_latency)
        with transaction():
            changed = (SimulatedServer.update(**values)
                       .where(SimulatedServer.uid == uid, SimulatedServer.gone.is_null()).execute())
        if not changed and 'gone' not in values:
            raise CloudError(f'the cloud {self.account} has no server {uid}', sure=True, status=404)

    def start(self, uid):
        self.set(uid, power='active')

    def stop(self, uid):
        self.set(uid, power='shutoff')

    def shelve(self, uid):
        self.set(uid, power='shelved_offloaded')

    def snapshot(self, uid, name):
        self.set(uid, saved=self.clock() + self.config.simulated_boot)
        return f'image-{uid}'

    def saved(self, image):
        found = SimulatedServer.get_or_none(SimulatedServer.uid == image.removeprefix('image-'))
        return self.clock() >= found.saved if found and found.saved else None


class Clouds:
    """Finds the account that serves a project on a cloud, and keeps it open."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.time):
        self.config, self.clock = config, clock
        self.opened: dict[str, Cloud] = {}
        self.lock = threading.Lock()

    def account(self, cloud: str, project: str) -> str:
        """The project's own entry of clouds.yaml, else the resource's."""
        return self.config.credentials.get(f'{project}@{cloud}', cloud)

    @functools.cached_property
    def store(self) -> str:
        """What all our marks begin with: two installations on one cloud don't touch each other's servers."""
        return f"cmres-{row('SELECT value FROM fact WHERE name = ?', 'store').value}"

    def accounts(self) -> set[str]:
        """All accounts that serve the resources there are."""
        clouds = {each.cloud for each in rows("SELECT DISTINCT cloud FROM resource WHERE cloud <> ''")}
        return clouds | {entry for key, entry in self.config.credentials.items() if key.rpartition('@')[2] in clouds}

    def open(self, account: str) -> Cloud:
        with self.lock:
            if account not in self.opened:
                self.opened[account] = self.make(account)
            return self.opened[account]

    def make(self, account: str) -> Cloud:
        if account == 'simulated' or account.startswith('simulated-'):
            return Simulated(account, self.store, self.config, self.clock)
        return OpenStack(account, self.store, self.config.call_timeout)


# Service #####################################################################
#
# What people can ask of cmres. A method reads: what is asked, what the cloud knows of it (outside
# any transaction), then one transaction that admits or refuses, then the answer read back.


class Actor(NamedTuple):
    """Who asks; an admin may act for everybody."""
    user: str
    project: str
    role: str


class Wish(NamedTuple):
    """A reservation that somebody asks for, read and resolved; seconds since 1970, MiB."""
    label: str
    user: str
    project: str
    resource: Any  # its row
    start: int
    end: int
    vms: int
    flavor: str
    image: str
    network: str
    key: str
    security_groups: list
    user_data: str
    metadata: dict
    server: str
    at_end: str
    notify: list
    lead: int
    description: str
    each: Amount  # what one machine takes
    warnings: list

    @property
    def amount(self) -> Amount:
        return self.each * self.vms

    @property
    def held(self) -> tuple[int, int]:
        return self.start - self.lead, self.end

    def columns(self, *names) -> dict:
        return {name: json.dumps(value) if isinstance(value, (list, dict)) else value
                for name in names for value in (getattr(self, name),)}


#: What can become of machines at the end of their window.
ENDS = ('delete', 'stop', 'shelve', 'snapshot')
#: What was announced of an occurrence: a bit each.
SOON, READY, ENDING = 1, 2, 4
#: The fields that only the cloud can judge.
CLOUDY = ('flavor', 'image', 'network', 'key', 'security_groups', 'server')
#: The fields of a reservation that a machine is made of; they are fixed once it has begun.
FIXED = (*CLOUDY, 'resource', 'start', 'lead', 'user_data', 'metadata')
STORED = ('label', 'user', 'project', *CLOUDY, 'user_data', 'metadata', 'at_end', 'notify', 'lead', 'description')
JSON = frozenset(('security_groups', 'metadata', 'notify', 'addresses'))
UNCHANGED = (*STORED, 'resource_id', 'start', 'end', 'held_from', 'held_until', 'vms', 'vcpus', 'ram', 'over')
OVER = ('ended', 'cancelled', 'failed')
PLACE = ('cell', 'cloud', 'region', 'aggregate')
HIDDEN = frozenset(('now', 'resource_id', 'held_from', 'held_until', 'over', 'due', 'reservation', 'user_data',
                    'existing', 'ever', 'runs', 'told'))
PATIENCE = 60  # seconds that a start may lie in the past: slow clocks, slow networks


def public(found) -> dict:
    """A row as an answer shows it: instants as datetimes, stored JSON read, nothing internal."""
    shown = {name: value for name, value in found._asdict().items() if name not in HIDDEN}
    for name, value in shown.items():
        if name in INSTANTS:
            shown[name] = instant(value)
        elif name in JSON:
            shown[name] = json.loads(value)
    return shown


def in_figures(amount: Amount) -> dict:
    return dict(zip(Amount._fields, amount))


def spread(name: str, lateness: list[float]) -> dict:
    """The median, the 95th of a hundred and the worst of some seconds."""
    ordered = sorted(max(each, 0) for each in lateness)
    return {f'{name}_{word}': round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3) if ordered else None
            for word, share in (('median', 0.5), ('95', 0.95), ('worst', 1))}


class Reservations:
    """The service, on behalf of one actor.

    Args:
      clock: seconds since 1970; the one place where time comes from
      wake: called after every change, so that the life cycle looks at once
      progress: passes rows through, and may show how many
    """

    def __init__(self, config: Config, clouds: Clouds, actor: Actor, clock: Callable[[], float] = time.time,
                 wake: Callable[[], None] = lambda: None, progress: Callable[[list], Iterable] = iter):
        self.config, self.clouds, self.actor = config, clouds, actor
        self.clock, self.wake, self.progress = clock, wake, progress

    def acting(self, actor: Actor) -> Reservations:
        """The same service on behalf of somebody else."""
        return Reservations(self.config, self.clouds, actor, self.clock, self.wake, self.progress)

    @property
    def here(self) -> Here:
        return Here(self.config.zone, instant(int(self.clock())))

    # Reservations

    @api('POST', '/reservation/')
    @api('POST', '/reservation/add/<label>/<resource>/<start>/<end>')
    @api('POST', '/reservation/add/<label>/<cell>/<cloud>/<region>/<aggregate>/<vms>/<start>/<end>', resource=ANY)
    def add(self, label: Label, resource: Place, start: When, end: When, vms: Count = 1, flavor: Name = '',
            image: Name = '', network: Name = '', key: Name = '', security_groups: Names = (), user_data: File = '',
            metadata: Pairs = None, server: Name = '', at_end: Name = '', notify: Names = (), lead: Span = None,
            description: Text = '', user: Name = '', project: Name = '', cell: Name = '', cloud: Name = '',
            region: Name = '', aggregate: Name = '', dry_run: bool = False) -> dict:
        """Reserves machines from START to END.

        With an image, they are booted at the start and deleted at the end, or what --at-end says;
        with --server, a machine that you have is started and stopped instead. With neither, capacity
        is held and nothing boots. With a flavor, its vcpus and ram count against the resource as
        well. What doesn't fit is refused with what would; `add --file FILE` is `load FILE`.

        Example:
          python cmres.py add lab demo 2026-12-01T09:00 +2h --vms 3 --flavor m1.small --image cirros
        """
        asked = {name: value for name, value in locals().items() if name not in ('self', 'dry_run')}
        wish = self.read_wish(asked)
        with self.recording_refusal(wish, dry_run), self.explaining(wish), self.writing(dry_run) as now:
            self.refuse_taken_label(wish, now)
            answer = public(self.occurrence(self.book(wish, now)))
        return answer | ({'warnings': wish.warnings} if wish.warnings else {})

    @api('POST', '/reservation/load')
    def load(self, rows: Rows, partial: bool = False, dry_run: bool = False) -> dict:
        """Adds many reservations at once: all of them, or with --partial those that fit.

        Each refused line is named with its number and the reason. In a CSV file the first line
        names the fields. Does not read more than 100000 lines.

        Example:
          python cmres.py load class.csv --partial
        """
        refused, wishes, taken = [], [], []
        for number, given in enumerate(self.progress(rows), 1):
            line = given.get('line', number)
            try:
                wishes.append((line, self.read_wish(self.read_line(given))))
            except Error as error:
                refused.append({'line': line, 'label': given.get('label', ''), 'error': str(error)})
        with self.writing(dry_run or bool(refused) and not partial) as now:
            for line, wish in wishes:
                try:
                    with db.atomic(), self.explaining(wish):
                        self.refuse_taken_label(wish, now)
                        taken.append(public(self.occurrence(self.book(wish, now))))
                except Error as error:
                    refused.append({'line': line, 'label': wish.label, 'error': str(error)})
            refused.sort(key=lambda each: each['line'])
            if refused and not partial:
                raise Conflict(f'{len(refused)} of {len(rows)} lines were refused, so nothing was reserved',
                               refused=refused)
        return {'taken': taken, 'refused': refused}

    def read_line(self, given: dict) -> dict:
        """The arguments of `add` that one line of many stands for; empty cells are not given."""
        operation = API['add']
        given = {name: value for name, value in given.items() if name != 'line' and value not in ('', None)}
        if 'dry_run' in given:
            raise Invalid('dry_run is for all lines together')
        defaults = {name: each.default for name, each in operation.parameters.items()}
        return defaults | bind(operation, given, self.here)

    @api('GET', '/reservation/')
    @api('GET', '/reservation/<label>')
    def list(self, label: Label = '', user: Name = '', project: Name = '', resource: Name = '', cell: Name = '',
             cloud: Name = '', region: Name = '', aggregate: Name = '', state: Names = (), start: When = None,
             end: When = None, limit: Page = 100, after: int = 0) -> Rows:
        """Lists reservations, the earliest first: those that are not over, or all that the filters meet.

        A label, a state or a window [START, END) that they overlap also finds what is over. Each page
        has at most --limit lines; --after the id of its last line gives the next.

        Example:
          python cmres.py list --resource demo --state starting,active
        """
        for word in state:
            if word not in STATES:
                raise Invalid(f"state: '{word}' is none of {', '.join(STATES)}{nearest(word, STATES)}")
        exact = {'r.label': label, 'r.user': user, 'r.project': project, 's.name': resource, 's.cell': cell,
                 's.cloud': cloud, 's.region': region, 's.aggregate': aggregate}
        where = [(f'{column} = ?', value) for column, value in exact.items() if value]
        where += self.window(start, end) + self.visible()
        if after:
            where.append(('(o.start, o.id) > (SELECT start, id FROM occurrence WHERE id = ?)', after))
        if not (label or state or start or end):
            state = [word for word in STATES if word not in OVER]
        if state and not set(state) & set(OVER):
            where.append(('o.due IS NOT NULL', None))
        found = self.search(where, state, limit)
        if label and not found:
            raise NotFound(f"there is no reservation '{label}'")
        return [public(each) for each in found]

    def window(self, start, end) -> list:
        first = self.here.now if isinstance(end, timedelta) else FIRST
        begin, until = self.resolve(start or first, end or LAST)
        return ([('o.end > ?', begin)] if start else []) + ([('o.start < ?', until)] if end else [])

    def visible(self) -> list:
        """The condition that keeps an actor to what is theirs."""
        return [] if self.actor.role == ADMIN else [('r.project = ?', self.actor.project)]

    def search(self, where: list, state: Iterable[str] = (), limit: int = -1, tail: str = 'ORDER BY start, id') -> list:
        """Rows of the listing that meet all conditions, a page of them."""
        condition = ' AND '.join(text for text, _ in where) or '1'
        values = tuple(value for text, value in where if '?' in text)
        in_state = f"state IN ({', '.join('?' * len(state))})" if state else '1'
        return listing(self.clock(), condition, (*values, *state), in_state,
                       f'{tail} LIMIT {limit}')

    def occurrence(self, id: int):
        return listing(self.clock(), 'o.id = ?', (id,))[0]

    def mine(self, label: str, project: str = '', live: bool = True):
        """The one reservation of that label that the actor means: not over, else (unless `live`) the latest.

        Raises:
          NotFound: there is none that they may see.
          Conflict: several projects have one; the sentence names them.
        """
        where = [('r.label = ?', label), *self.visible(), *([('r.project = ?', project)] if project else [])]
        usable = self.search([*where, ('r.over > ?', int(self.clock()))])
        if not usable:
            past = self.search(where, tail='ORDER BY over DESC, id DESC', limit=1)
            if live or not past:
                raise NotFound(f"there is no reservation '{label}'{' that is not over' if past else ''}")
            usable = past
        usable = [each for each in usable if each.project == self.actor.project] or usable
        if len(usable) > 1:
            projects = ', '.join(sorted(each.project for each in usable))
            raise Conflict(f"'{label}' is in several projects ({projects}); name one with --project")
        return usable[0]

    @api('GET', '/reservation/<label>/show')
    def show(self, label: Label, project: Name = '') -> dict:
        """Shows all of one reservation: what was asked, its state, its servers.

        Example:
          python cmres.py show lab
        """
        found = self.mine(label, project, live=False)
        return public(found) | {'user_data': found.user_data, 'servers': self.servers(label, project)}

    @api('GET', '/reservation/<label>/servers')
    def servers(self, label: Label, project: Name = '') -> Rows:
        """Lists the servers of a reservation: state, addresses, and when each was planned, begun and ready.

        Example:
          python cmres.py servers lab
        """
        found = self.mine(label, project, live=False)
        return [public(each) for each in rows(
            'SELECT n, name, state, addresses, planned, begun, ready, deleted, snapshot, tries, fault, account, uid '
            'FROM server WHERE occurrence_id = ? ORDER BY n, id', found.id)]

    @api('GET', '/reservation/<label>/duration')
    def duration(self, label: Label, project: Name = '') -> dict:
        """Tells how long a reservation is.

        Example:
          python cmres.py duration lab
        """
        found = self.mine(label, project, live=False)
        seconds = found.end - found.start
        return {'label': label, 'duration': format_duration(seconds), 'seconds': seconds}

    @api('PATCH', '/reservation/<label>')
    def update(self, label: Label, resource: Label = None, start: When = None, end: When = None, vms: Count = None,
               flavor: Name = None, image: Name = None, network: Name = None, key: Name = None,
               security_groups: Names = None, user_data: File = None, metadata: Pairs = None, at_end: Name = None,
               notify: Names = None, lead: Span = None, description: Text = None, user: Name = None,
               rename: Label = None, project: Name = '', dry_run: bool = False) -> dict:
        """Changes a reservation, all of it or nothing.

        A new start alone moves it with its length; a new end alone makes it longer or shorter. One
        that has begun keeps its start, its place and what its machines are made of.

        Example:
          python cmres.py update lab --start 2026-12-01T10:00 --vms 5
        """
        asked = {name: value for name, value in locals().items()
                 if value is not None and name not in ('self', 'label', 'rename', 'project', 'dry_run')}
        return self.alter(label, project, asked | ({'label': rename} if rename else {}), dry_run)

    @api('POST', '/reservation/<label>/extend')
    def extend(self, label: Label, by: Span, project: Name = '', dry_run: bool = False) -> dict:
        """Lets a reservation end later; works until its end.

        Example:
          python cmres.py extend lab +1h
        """
        if by <= timedelta(0):
            raise Invalid(f'by: {to_plain(by)} is no length to extend by; write +1h')
        return self.alter(label, project, {'end': instant(self.mine(label, project).end) + by}, dry_run)

    @api('POST', '/reservation/<label>/keep')
    def keep(self, label: Label, until: When, project: Name = '', dry_run: bool = False) -> dict:
        """Lets what runs now go on until a later instant, if that fits.

        Example:
          python cmres.py keep lab +2h
        """
        old = self.mine(label, project)
        until = instant(old.end) + until if isinstance(until, timedelta) else until
        if self.clock() < old.held_from:
            raise Conflict(f"'{label}' has not begun; `update` moves its end")
        if until.timestamp() <= old.end:
            raise Invalid(f'until: {to_plain(until)} is not after the end, {to_plain(instant(old.end))}')
        return self.alter(label, project, {'end': until}, dry_run, 'kept')

    @api('POST', '/reservation/<label>/skip')
    def skip(self, label: Label, project: Name = '', dry_run: bool = False) -> dict:
        """Leaves out the next occurrence, which must not have begun.

        Example:
          python cmres.py skip lab
        """
        with self.writing(dry_run) as now:
            found = self.mine(label, project)
            if now >= found.held_from:
                raise Conflict(f"'{label}' has begun; `delete` ends it")
            self.cancel(found, now, f'skipped by {self.actor.user}')
            return public(self.occurrence(found.id))

    def alter(self, label: str, project: str, asked: dict, dry_run: bool, code: str = 'updated') -> dict:
        """The one way to change a reservation: release and hold anew in one transaction."""
        if not asked:
            raise Invalid('say what to change, such as --end or --vms')
        for _ in range(10):  # what the cloud was asked about may be out of date by the time we write
            old = self.mine(label, project)
            wish = self.read_wish(self.unaltered(old) | asked, old, asked)
            with self.explaining(wish, old), self.writing(dry_run) as now:
                current = self.occurrence(old.id)
                if all(getattr(current, name) == getattr(old, name) for name in UNCHANGED):
                    self.rewrite(old, wish, asked, now, code)
                    answer = public(self.occurrence(old.id))
                    return answer | ({'warnings': wish.warnings} if wish.warnings else {})
        raise Conflict(f"'{label}' is being changed by others all the time; try again")

    def rewrite(self, old, wish: Wish, asked: dict, now: float, code: str) -> None:
        self.refuse_fixed(old, wish, asked)
        if (wish.label, wish.project) != (old.label, old.project):
            self.refuse_taken_label(wish, now)
        self.rebook(old, wish, now)
        self.journal(now, code, f"{self.actor.user} changed: {', '.join(asked)}", old.reservation, wish.notify)

    def unaltered(self, old) -> dict:
        """What `add` would have to be asked to get the same reservation."""
        kept = {name: getattr(old, name) for name in (*STORED, 'resource', 'vms')}
        return kept | {name: json.loads(kept[name]) for name in kept if name in JSON} | {
                       'lead': timedelta(seconds=old.lead), 'start': instant(old.start)}

    def refuse_fixed(self, old, wish: Wish, asked: dict) -> None:
        """A reservation that has begun keeps what its machines are made of."""
        begun = self.clock() >= (old.held_from if old.runs else old.start)
        kept = {name: json.loads(getattr(old, name)) if name in JSON else getattr(old, name) for name in FIXED}
        new = {name: getattr(wish, name) for name in FIXED} | {'resource': wish.resource.name}
        changed = [name for name in FIXED if name in asked and new[name] != kept[name]]
        if begun and changed:
            raise Conflict(f"'{old.label}' has begun, so its {changed[0].replace('_', ' ')} can't change; "
                           'its end, vms, user, description and label can')

    @api('DELETE', '/reservation/<label>')
    @api('DELETE', '/reservation/')
    @api('DELETE', '/reservation/delete/<label>')
    @api('POST', '/reservation/delete/<label>')
    @api('DELETE', '/reservation/delete/<label>/<cell>/<cloud>/<region>/<aggregate>/<vms>/<start>/<end>')
    @api('POST', '/reservation/delete/<label>/<cell>/<cloud>/<region>/<aggregate>/<vms>/<start>/<end>')
    def delete(self, label: Label = '', user: Name = '', project: Name = '', resource: Name = '', cell: Name = '',
               cloud: Name = '', region: Name = '', aggregate: Name = '', vms: Count = None, start: When = None,
               end: When = None, count: Count = None, dry_run: bool = False) -> Rows:
        """Cancels a reservation: its capacity is free at once, and its machines are deleted.

        Give a label, or filters that must all match exactly (start and end too); without a label,
        --count must say how many that hits. Nothing that is over is touched.

        Example:
          python cmres.py delete --resource demo --user eva --dry-run
        """
        exact = {'r.label': label, 'r.user': user, 'r.project': project, 's.name': resource, 's.cell': cell,
                 's.cloud': cloud, 's.region': region, 's.aggregate': aggregate, 'o.vms': vms}
        if start or end:
            begin, until = self.resolve(start or FIRST, end or LAST)
            exact |= ({'o.start': begin} if start else {}) | ({'"end"': until} if end else {})
        if not any(exact.values()):
            raise Invalid('say which: a label, or filters such as --resource and --user')
        where = [(f'{column} = ?', value) for column, value in exact.items() if value]
        with self.writing(dry_run) as now:
            found = self.search([*where, *self.visible(), ('r.over > ?', int(now))])
            self.refuse_uncounted(found, label, project, count, dry_run)
            for each in found:
                self.cancel(each, now)
            return [public(self.occurrence(each.id)) for each in found]

    def refuse_uncounted(self, found: list, label: str, project: str, count: int | None, dry_run: bool) -> None:
        if not found:
            raise NotFound(f"there is no reservation {shown(label) + ' ' if label else ''}that is not over"
                           f"{'' if label else ' and meets all of these filters'}")
        if label and len(found) > 1:
            self.mine(label, project)  # refuses, naming the projects, unless one of them is the actor's own
            found[:] = [each for each in found if each.project == self.actor.project]
        if not label and count != len(found) and not dry_run:
            raise Conflict(f'this would cancel {len(found)} reservations; say --count {len(found)} to do it',
                           labels=[each.label for each in found[:100]], count=len(found))

    @api('GET', '/resource/<resource>/find')
    def find(self, resource: Label, duration: Span, vms: Count = 1, flavor: Name = '', lead: Span = None,
             after: When = None, before: When = None, limit: Page = 10) -> Rows:
        """Finds the earliest slots that are free for so many machines for so long.

        Each slot says from when until when it is free. Looks a year ahead unless --before says how far.

        Example:
          python cmres.py find demo 2h --vms 4
        """
        place = self.resource_row(resource)
        if duration < timedelta(seconds=1):
            raise Invalid('duration: a slot has at least one second')
        begin, until = self.resolve(after or self.here.now, before or timedelta(days=366))
        begin = max(begin, int(self.clock()))
        amount = self.each_takes(self.ask_cloud(place, {'flavor': flavor}, [])) * vms
        need, ahead = duration.total_seconds(), (lead or timedelta(0)).total_seconds()
        slots = ((first, last) for first, last in free_windows(place, amount, begin - ahead, until)
                 if last - first >= need + ahead)
        return [{'start': instant(int(first + ahead)), 'until': instant(int(last)),
                 'duration': format_duration(last - first - ahead), 'vms': vms}
                for (first, last), _ in zip(slots, range(limit))]

    @api('GET', '/resource/<resource>/usage')
    def usage(self, resource: Label, start: When = None, end: When = None) -> Rows:
        """Tells how much of a resource is held, when; by whom it doesn't tell.

        Shows the next 7 days unless --start or --end say otherwise.

        Example:
          python cmres.py usage demo --end +1d
        """
        place = self.resource_row(resource)
        begin, until = self.resolve(start or self.here.now, end or timedelta(days=7))
        levels = [*steps(place.id, begin, until), (until, NOTHING)]
        return [{'start': instant(at), 'end': instant(after), **in_figures(held),
                 'free_vms': None if place.vms is None else place.vms - held.vms}
                for (at, held), (after, _) in zip(levels, levels[1:])]

    @api('POST', '/reservation/generate')
    def generate(self, resource: Label = 'demo', count: Page = 10, seed: int = None, flavor: Name = '',
                 image: Name = '', dry_run: bool = False) -> dict:
        """Adds random reservations within the next week, for trying things out; those that don't fit are left out.

        Example:
          python cmres.py generate demo --count 20
        """
        chance, place, now = random.Random(seed), self.resource_row(resource), self.here.now
        most = min(place.vms or 8, 8)
        wanted = [{'label': f'random-{secrets.token_hex(4)}', 'resource': resource,
                   'start': now + timedelta(minutes=15 * chance.randrange(1, 600)),
                   'end': timedelta(minutes=30 * chance.randrange(1, 17)), 'vms': chance.randint(1, most),
                   'flavor': flavor, 'image': image} for _ in range(count)]
        return self.load(wanted, partial=True, dry_run=dry_run)

    @api('GET', '/check', role=ADMIN)
    def check(self) -> dict:
        """Rebuilds the usage from the occurrences and compares it with what is kept; fails on any difference.

        Example:
          python cmres.py check
        """
        differences, steps_seen = [], 0
        with db.atomic('DEFERRED'):  # one snapshot of all tables; nobody waits for it
            for place in self.progress(rows('SELECT id, name FROM resource')):
                kept = {at: Amount(*held) for at, *held in run(
                    'SELECT at, vms, vcpus, ram FROM step WHERE resource_id = ?', place.id)}
                right = dict(held_steps(place.id))
                steps_seen += len(right)
                wrong = sorted(at for at in kept.keys() | right.keys() if kept.get(at) != right.get(at))
                differences += [{'resource': place.name, 'at': instant(at), 'kept': kept.get(at),
                                 'right': right.get(at)} for at in wrong]
        if differences:
            raise Error(f'the usage differs from the occurrences at {len(differences)} instants, first on '
                        f"{differences[0]['resource']} at {differences[0]['at']}", differences=differences[:100])
        return {'steps': steps_seen, 'differences': 0}

    @api('GET', '/event/')
    @api('GET', '/reservation/<label>/events')
    def events(self, label: Label = '', project: Name = '', after: int = 0, limit: Page = 100) -> Rows:
        """Shows the journal: when, who, what, why; the newest lines last.

        On the command line, --follow goes on to show each event as it comes, until Ctrl-C.

        Example:
          python cmres.py events lab --follow
        """
        where = [('e.id > ?', after), *self.visible(), *([('r.label = ?', label)] if label else []),
                 *([('r.project = ?', project)] if project else [])]
        found = rows('SELECT e.id, e.at, e.actor, e.code, r.label, r.project, e.sentence '
                     'FROM event e LEFT JOIN reservation r ON r.id = e.reservation_id WHERE '
                     f"{' AND '.join(text for text, _ in where)} ORDER BY e.id {'ASC' if after else 'DESC'} "
                     f'LIMIT {limit}', *(value for _, value in where))
        return [public(each) for each in (found if after else found[::-1])]

    @api('GET', '/punctuality/')
    def punctuality(self, since: When = None) -> dict:
        """Tells how late servers were begun and ready, per cloud, in seconds: median, 95 %, worst; and what failed.

        Example:
          python cmres.py punctuality --since 2026-11-01
        """
        first = self.resolve(since, LAST)[0] if since else int(self.clock()) - 30 * 86400
        where = [('v.planned >= ?', first), ('NOT v.borrowed', None), *self.visible()]
        found = rows(f"""
            SELECT v.account AS cloud, v.name, r.label, v.tries, v.fault, v.planned, v.ready - v.planned AS ready,
                   v.begun - v.planned + CASE WHEN v.planned = o.start THEN o.start - o.held_from ELSE 0 END AS begun
              FROM server v JOIN occurrence o ON o.id = v.occurrence_id JOIN reservation r ON r.id = o.reservation_id
             WHERE {' AND '.join(text for text, _ in where)} ORDER BY v.account, v.id""",
                     *(value for text, value in where if '?' in text))
        late: dict = defaultdict(list)
        for each in found:
            late[each.cloud].append(each)
        failed = [each for each in found if each.ready is None and each.fault]
        return {'clouds': [{'cloud': cloud, 'servers': len(servers),
                            **spread('begun', [each.begun for each in servers if each.begun is not None]),
                            **spread('ready', [each.ready for each in servers if each.ready is not None]),
                            'tried_again': sum(each.tries > 1 for each in servers)}
                           for cloud, servers in late.items()],
                'failed': [{'cloud': each.cloud, 'label': each.label, 'name': each.name, 'tries': each.tries,
                            'planned': instant(each.planned), 'fault': each.fault} for each in failed[-100:]]}

    # Resources

    @api('POST', '/resource/', role=ADMIN)
    def resource_add(self, name: Label, cell: Name = '', cloud: Name = '', region: Name = '', aggregate: Name = '',
                     vms: Most = UNLIMITED, vcpus: Most = UNLIMITED, ram: Most = UNLIMITED,
                     dry_run: bool = False) -> dict:
        """Adds a resource; a figure that isn't given is unlimited.

        Example:
          python cmres.py resource add india --cloud simulated --vms 40 --vcpus 320 --ram 655360
        """
        with self.writing(dry_run) as now:
            self.refuse_taken_resource(name)
            figures = {figure: None if most == UNLIMITED else most
                       for figure, most in (('vms', vms), ('vcpus', vcpus), ('ram', ram))}
            insert(Resource, name=name, cell=cell, cloud=cloud, region=region, aggregate=aggregate,
                   **figures, added=int(now))
            self.journal(now, 'resource', f"added the resource '{name}'")
            return self.resource_show(name)

    @api('GET', '/resource/')
    def resource_list(self, cell: Name = '', cloud: Name = '', region: Name = '', aggregate: Name = '') -> Rows:
        """Lists the resources: their places and what they hold at most.

        Example:
          python cmres.py resource list --cloud simulated
        """
        return [self.resource_public(each) for each in self.places(cell, cloud, region, aggregate)]

    @api('GET', '/resource/<name>')
    def resource_show(self, name: Label) -> dict:
        """Shows a resource, and what is held of it now.

        Example:
          python cmres.py resource show demo
        """
        found = self.resource_row(name)
        return self.resource_public(found) | {'held_now': in_figures(level(found.id, self.clock()))}

    @api('PATCH', '/resource/<name>', role=ADMIN)
    def resource_update(self, name: Label, rename: Label = '', cell: Name = None, cloud: Name = None,
                        region: Name = None, aggregate: Name = None, vms: Most = None, vcpus: Most = None,
                        ram: Most = None, force: bool = False, dry_run: bool = False) -> dict:
        """Changes a resource; `unlimited` takes a limit away.

        A capacity below what is held already needs --force; nothing is cancelled then, and the
        answer lists the occurrences that no longer fit, the latest added first.

        Example:
          python cmres.py resource update demo --vms 8 --dry-run
        """
        asked = {'name': rename or None, 'cell': cell, 'cloud': cloud, 'region': region, 'aggregate': aggregate,
                 'vms': vms, 'vcpus': vcpus, 'ram': ram}
        new = {field: None if value == UNLIMITED else value for field, value in asked.items() if value is not None}
        with self.writing(dry_run) as now:
            found = self.resource_row(name)
            if rename and rename != name:
                self.refuse_taken_resource(rename)
            if new:
                change(Resource, found.id, **new)
            before, found = found, self.resource_row(rename or name)
            lowered = not all(Amount(most or 0).within([limit]) if most is not None else limit is None
                              for most, limit in zip(capacity(before), capacity(found)))
            homeless = self.no_longer_fitting(found, now) if lowered else []
            if homeless and not force:
                raise Conflict(f"{len(homeless)} occurrences on '{name}' would no longer fit; --force does it all the "
                               'same and cancels nothing', occurrences=homeless)
            self.journal(now, 'resource', f"changed the resource '{name}': {', '.join(new) or 'nothing'}")
            return self.resource_public(found) | {'no_longer_fit': homeless}

    @api('DELETE', '/resource/<name>', role=ADMIN)
    def resource_delete(self, name: Label, dry_run: bool = False) -> dict:
        """Removes a resource that nothing is reserved on any more; its history stays.

        Example:
          python cmres.py resource delete demo
        """
        with self.writing(dry_run) as now:
            found = self.resource_row(name)
            busy = self.search([('o.resource_id = ?', found.id), ('r.over > ?', int(now))], limit=100)
            if busy:
                raise Conflict(f"'{name}' still has reservations; delete or move them first",
                               labels=[each.label for each in busy])
            change(Resource, found.id, removed=int(now))
            self.journal(now, 'resource', f"removed the resource '{name}'")
            return self.resource_public(found)

    # Tokens

    @api('POST', '/token/', role=ADMIN)
    def token_add(self, user: Name, project: Name = 'default', role: Name = USER, dry_run: bool = False) -> dict:
        """Makes a token for a user in a project, and prints it: it is shown only now.

        Example:
          python cmres.py token add eva --project biology --role user
        """
        if role not in ROLES:
            raise Invalid(f"role: '{role}' is none of {', '.join(ROLES)}{nearest(role, ROLES)}")
        if not user or not project:
            raise Invalid('a token needs a user and a project')
        token = f'cmres_{secrets.token_urlsafe(32)}'
        with self.writing(dry_run) as now:
            insert(Token, user=user, project=project, role=role, hash=hashed(token), added=int(now))
            self.journal(now, 'token', f'made a token for {user} in {project} as {role}')
        return {'user': user, 'project': project, 'role': role} if dry_run else {'token': token}

    @api('GET', '/token/', role=ADMIN)
    def token_list(self) -> Rows:
        """Lists the tokens: whose, which role; never the tokens themselves, of which only hashes are kept.

        Example:
          python cmres.py token list
        """
        return [public(each) for each in rows('SELECT id, user, project, role, added, revoked FROM token ORDER BY id')]

    @api('DELETE', '/token/<id>', role=ADMIN)
    def token_revoke(self, id: int, dry_run: bool = False) -> dict:
        """Makes a token worthless from now on.

        Example:
          python cmres.py token revoke 3
        """
        with self.writing(dry_run) as now:
            if not row('SELECT id FROM token WHERE id = ? AND revoked IS NULL', id):
                raise NotFound(f'there is no token {id} that is in force')
            change(Token, id, revoked=int(now))
            self.journal(now, 'token', f'revoked token {id}')
            return public(row('SELECT id, user, project, role, added, revoked FROM token WHERE id = ?', id))

    # What the operations are made of

    @contextmanager
    def writing(self, dry_run: bool = False) -> Iterator[float]:
        """A transaction that yields its instant and wakes the life cycle when it has changed something."""
        with transaction(keep=not dry_run):
            yield self.clock()
        if not dry_run:
            self.wake()

    def resolve(self, start, end) -> tuple[int, int]:
        """The seconds of a window: a length for a start counts from now, for an end from the start."""
        start = self.here.now + start if isinstance(start, timedelta) else start
        try:
            end = start + end if isinstance(end, timedelta) else end
        except OverflowError:
            end = LAST
        if not start < end <= LAST:
            raise Invalid(f'the end {to_plain(end)} is not after the start {to_plain(start)} and before the year 2200')
        return int(start.timestamp()), int(end.timestamp())

    def read_wish(self, asked: dict, old=None, changes: Iterable[str] = STORED) -> Wish:
        """Resolves what is asked, checks it and asks the cloud about it; outside any transaction.

        Args:
          old: the row of the reservation that this would change
          changes: the fields that are new in it
        """
        lead = int((asked['lead'] or timedelta(0)).total_seconds())
        start, end = self.resolve_window(asked, old, lead)
        if old and self.actor.role != ADMIN and asked['user'] != old.user:
            raise Forbidden(f"only an admin may give a reservation of '{old.user}' to somebody else")
        user, project = (asked['user'], old.project) if old else self.owner(asked)
        place, warnings = self.resource_at(asked), []
        self.refuse_unbootable(asked, place)
        if old and not {'resource', *CLOUDY} & set(changes):
            each, server = Amount(1, old.vcpus // old.vms, old.ram // old.vms), old.server
        else:
            found = self.ask_cloud(place, asked | {'project': project}, warnings)
            each, server = self.each_takes(found), found.get('server', {}).get('id', '')
        return Wish(asked['label'], user, project, place, start, end, asked['vms'], asked['flavor'], asked['image'],
                    asked['network'], asked['key'], [*asked['security_groups']], asked['user_data'],
                    dict(asked['metadata'] or {}), server, asked['at_end'] or ('stop' if server else 'delete'),
                    [*asked['notify']], lead, asked['description'], each, warnings)

    def refuse_unbootable(self, asked: dict, place) -> None:
        """Refuses combinations that could never boot, end or be told of."""
        boots, has = asked['image'], asked['server']
        if boots and has:
            raise Invalid('an image or a server, not both: a machine is made anew, or it is there already')
        if boots and not asked['flavor']:
            raise Invalid('an image needs a flavor to boot it with')
        if (boots or has) and not place.cloud:
            raise Invalid(f"the resource '{place.name}' has no cloud, so nothing can boot there; leave the "
                          f"{'image' if boots else 'server'} out")
        if has and asked['vms'] != 1:
            raise Invalid(f"vms: a server is one machine, not {asked['vms']}")
        ends = ENDS[1:3] if has else ENDS
        if asked['at_end'] not in ('', *ends):
            raise Invalid(f"at_end: '{asked['at_end']}' is none of {', '.join(ends)}{nearest(asked['at_end'], ends)}")
        for target in asked['notify']:
            if not re.fullmatch(r'https?://\S+|[^@\s,<>]+@[^@\s,<>]+', target) or len(asked['notify']) > 10:
                raise Invalid(f"notify: '{target}' is no mail address and no http(s) address, or they are over 10")

    def resolve_window(self, asked: dict, old, lead: int) -> tuple[int, int]:
        """Start and end in seconds; without a new end, one that is moved keeps its length."""
        length = timedelta(seconds=old.end - old.start) if old else None
        start, end = self.resolve(asked['start'], asked.get('end', length))
        now = self.clock()
        if start < now - PATIENCE and not (old and start == old.start):
            raise Invalid(f'the start {to_plain(instant(start))} lies in the past')
        if end <= now:
            raise Invalid(f'the end {to_plain(instant(end))} is not in the future')
        if start < lead:
            raise Invalid('the lead reaches before the year 1970')
        return start, end

    def owner(self, asked: dict) -> tuple[str, str]:
        """Whose it will be: only an admin may reserve for others."""
        user, project = asked['user'] or self.actor.user, asked['project'] or self.actor.project
        if self.actor.role != ADMIN and project != self.actor.project:
            raise Forbidden(f"only an admin may act in another project than their own, '{self.actor.project}'")
        if self.actor.role != ADMIN and asked['user'] not in ('', self.actor.user):
            raise Forbidden(f"only an admin may reserve for another user than themselves, '{self.actor.user}'")
        return user, project

    def resource_row(self, name: str):
        found = row('SELECT * FROM resource WHERE name = ? AND removed IS NULL', name)
        if not found:
            names = [each.name for each in self.places()]
            raise NotFound(f"there is no resource '{name}'{nearest(name, names)}")
        return found

    def places(self, *place: str) -> list:
        """Resources by cell, cloud, region and aggregate, as far as these are given."""
        given = [(column, value) for column, value in zip(PLACE, place) if value]
        condition = ''.join(f' AND "{column}" = ?' for column, _ in given)
        return rows(f'SELECT * FROM resource WHERE removed IS NULL{condition} ORDER BY name',
                    *(value for _, value in given))

    def resource_at(self, asked: dict):
        """The resource that is named, or the one at the place that is asked for."""
        place = [asked.get(column, '') for column in PLACE]
        where = ', '.join(f'{column} {value}' for column, value in zip(PLACE, place) if value) or 'any place'
        if asked['resource'] != ANY:
            found = self.resource_row(asked['resource'])
            if any(wanted not in ('', is_at) for wanted, is_at in zip(place, (getattr(found, each) for each in PLACE))):
                raise NotFound(f"the resource '{found.name}' is not at {where}; leave the place out, or say - for "
                               'its name')
            return found
        found = self.places(*place)
        if not found:
            raise NotFound(f'there is no resource at {where}')
        if len(found) > 1:
            names = ', '.join(each.name for each in found[:20])
            raise Conflict(f'{len(found)} resources are at {where}; name one of {names}')
        return found[0]

    def ask_cloud(self, place, asked: dict, warnings: list) -> dict:
        """What the resource's cloud knows under the names that are asked for; an unknown one is refused.

        If the cloud can't be asked, that goes to `warnings`, unless only it could tell what is needed.
        """
        named = [(kind, asked[kind]) for kind in CLOUDY if kind != 'security_groups' and asked.get(kind)]
        named += [('security_group', name) for name in asked.get('security_groups', ())]
        named = [pair for pair in named if pair not in (('network', 'auto'), ('network', 'none'))]
        if not named:
            return {}
        if not place.cloud:
            raise Invalid(f"the resource '{place.name}' has no cloud that knows the {named[0][0].replace('_', ' ')} "
                          f"'{named[0][1]}'; leave it out")
        account = self.clouds.account(place.cloud, asked.get('project', self.actor.project))
        try:
            return dict(zip((kind for kind, _ in named), self.clouds.open(account).check(named)))
        except CloudError as error:
            if asked.get('flavor') and (place.vcpus, place.ram) != (None, None):
                raise CloudError(f"{error}; its flavor '{asked['flavor']}' must be known to count "
                                 f"vcpus and ram on '{place.name}'") from None
            if asked.get('server'):
                raise CloudError(f"{error}; it must tell which server '{asked['server']}' is") from None
            warnings.append(f'not checked: {error}')
            return {}

    def each_takes(self, found: dict) -> Amount:
        """What one machine takes, of what the cloud told."""
        return Amount(1, *(found['flavor'][figure] for figure in Flavor._fields)) if 'flavor' in found else Amount(1)

    def refuse_shared_server(self, wish: Wish, own: int = 0) -> None:
        """A machine that somebody has can be started and stopped by one reservation at a time."""
        begin, until = wish.held
        other = row('SELECT r.label FROM occurrence o JOIN reservation r ON r.id = o.reservation_id WHERE r.server = ? '
                    'AND o.due IS NOT NULL AND o.held_from < ? AND o.held_until > ? AND o.id <> ?',
                    wish.server, until, begin, own) if wish.server else None
        if other:
            raise Conflict(f"the server {wish.server} is reserved by '{other.label}' in that time already")

    def refuse_taken_label(self, wish: Wish, now: float) -> None:
        read_argument('label', wish.label, Label, self.here)  # Python may call without `bind`
        if row('SELECT id FROM reservation WHERE project = ? AND label = ? AND over > ?',
               wish.project, wish.label, int(now)):
            raise Conflict(f"the label '{wish.label}' is taken in project '{wish.project}' by a reservation that is "
                           'not over; choose another')

    def refuse_taken_resource(self, name: str) -> None:
        read_argument('name', name, Label, self.here)
        if row('SELECT id FROM resource WHERE name = ? AND removed IS NULL', name):
            raise Conflict(f"there is a resource '{name}' already; choose another name or update that one")

    def book(self, wish: Wish, now: float) -> int:
        """Writes a reservation and its occurrence, and holds its amount; inside a transaction."""
        place = self.resource_row(wish.resource.name)  # its capacity may have changed since
        begin, until = wish.held
        self.refuse_shared_server(wish)
        admit(place, begin, until, wish.amount, now)
        reservation = insert(Reservation, **wish.columns(*STORED), added=int(now), changed=int(now), over=wish.end)
        held = wish.amount
        occurrence = insert(Occurrence, reservation=reservation, resource=place.id, start=wish.start, end=wish.end,
                            held_from=begin, held_until=until, vms=held.vms, vcpus=held.vcpus, ram=held.ram, told=0,
                            due=min(begin, wish.start - self.config.notice))
        self.journal(now, 'added', f'{wish.vms} vms on {place.name}', reservation, wish.notify)
        return occurrence

    def rebook(self, old, wish: Wish, now: float) -> None:
        """Releases what an occurrence held and holds what is wished instead; inside a transaction."""
        place = self.resource_row(wish.resource.name)
        begin, until = wish.held
        before, amount = Amount(old.vms, old.vcpus, old.ram), wish.amount
        self.refuse_shared_server(wish, old.id)
        release(old.resource_id, old.held_from, old.held_until, before)
        smaller = (place.id == old.resource_id and old.held_from <= begin and until <= old.held_until
                   and amount.within(before))
        if smaller:  # always allowed, even where a lowered capacity is overfull
            hold(place.id, begin, until, amount)
        else:
            admit(place, begin, until, amount, now)
        change(Reservation, old.reservation, **wish.columns(*STORED), changed=int(now), over=wish.end)
        change(Occurrence, old.id, resource=place.id, start=wish.start, end=wish.end, held_from=begin,
               held_until=until, vms=amount.vms, vcpus=amount.vcpus, ram=amount.ram, due=min(now, begin),
               told=0 if wish.start != old.start else old.told & ~(ENDING if wish.end != old.end else 0))

    def cancel(self, found, now: float, why: str = '') -> None:
        """Ends a reservation now: what it held from now on is free; inside a transaction."""
        until = min(max(int(now), found.held_from), found.held_until)
        release(found.resource_id, until, found.held_until, Amount(found.vms, found.vcpus, found.ram))
        change(Occurrence, found.id, cancelled=int(now), held_until=until, due=now)
        change(Reservation, found.reservation, over=int(now), changed=int(now))
        self.journal(now, 'released', why or f'cancelled by {self.actor.user}', found.reservation,
                     json.loads(found.notify))

    def journal(self, now: float, code: str, sentence: str, reservation: int | None = None,
                notify: Iterable[str] = ()) -> None:
        journal(self.config, now, self.actor.user, code, sentence, reservation, notify)

    def resource_public(self, found) -> dict:
        return {name: value for name, value in public(found).items() if name != 'removed'}

    def no_longer_fitting(self, place, now: float) -> list[dict]:
        """Of the occurrences where more is held than there is, as many of the latest added as must go."""
        levels = list(steps(place.id, int(now), LAST.timestamp()))
        over = {at: held for at, held in levels if not held.within(capacity(place))}
        ends = {at: after for (at, _), (after, _) in zip(levels, [*levels[1:], (LAST.timestamp(), NOTHING)])}
        homeless = []
        held = rows('SELECT id, held_from, held_until, vms, vcpus, ram FROM occurrence WHERE resource_id = ? '
                    'AND due IS NOT NULL AND held_until > ? ORDER BY id DESC', place.id, int(now)) if over else []
        for each in held:
            touched = [at for at in over if at < each.held_until and ends[at] > each.held_from]
            if any(not over[at].within(capacity(place)) for at in touched):
                homeless.append(each.id)
                for at in touched:
                    over[at] -= Amount(each.vms, each.vcpus, each.ram)
        return [public(self.occurrence(id)) for id in homeless[:1000]]

    # What to say when something doesn't fit

    @contextmanager
    def recording_refusal(self, wish: Wish, dry_run: bool) -> Iterator[None]:
        try:
            yield
        except NoCapacity as refusal:
            if not dry_run:
                with transaction():
                    sentence = f"'{wish.label}' of {wish.user}: {refusal}"
                    self.journal(self.clock(), 'refused', sentence, None, wish.notify)
            raise

    @contextmanager
    def explaining(self, wish: Wish, old=None) -> Iterator[None]:
        """Makes of a bare NoCapacity one that says what is in the way and what would fit."""
        try:
            yield
        except NoCapacity:
            with transaction(keep=False) if old else nullcontext():
                if old:  # it is not in its own way
                    release(old.resource_id, old.held_from, old.held_until, Amount(old.vms, old.vcpus, old.ram))
                wish = wish._replace(resource=self.resource_row(wish.resource.name))
                raise NoCapacity(self.why_not(wish), **self.in_the_way(wish, old), **self.would_fit(wish)) from None

    def why_not(self, wish: Wish) -> str:
        begin, until = wish.held
        most = capacity(wish.resource)
        used = peak(wish.resource.id, max(begin, int(self.clock())), until)
        lacking = [name for name, limit, held, need in zip(Amount._fields, most, used, wish.amount)
                   if limit is not None and held + need > limit]
        if not lacking:  # somebody has just given something back
            return f"'{wish.resource.name}' was full a moment ago; try again"
        figure = min(lacking, key=lambda name: getattr(wish.amount, name) <= getattr(most, name))
        limit, need = getattr(most, figure), getattr(wish.amount, figure)
        unit = 'MiB of ram' if figure == 'ram' else figure
        if need > limit:
            return f"'{wish.resource.name}' holds at most {limit} {unit}; {need} are asked for"
        zone = self.config.zone
        return (f"'{wish.resource.name}' has {max(limit - getattr(used, figure), 0)} of {limit} {unit} free from "
                f'{format_time(instant(begin), zone)} to {format_time(instant(until), zone)}; {need} are asked for')

    def in_the_way(self, wish: Wish, old) -> dict:
        """At most ten of the occurrences that hold something in the window; of others' only how much and when."""
        begin, until = wish.held
        found = self.search([('o.resource_id = ?', wish.resource.id), ('o.due IS NOT NULL', None),
                             ('o.start < ?', until + 86400), ('o.held_from < ?', until),
                             ('o.held_until > ?', max(begin, int(self.clock()))), ('o.id <> ?', old.id if old else 0)],
                            limit=10, tail='ORDER BY start DESC, id DESC')[::-1]
        fields = ('label', 'user', 'project', 'vms', 'start', 'end')
        seen = self.actor.role == ADMIN
        return {'in_the_way': [{name: value for name, value in public(each).items()
                                if name in (fields if seen or each.project == self.actor.project else fields[3:])}
                               for each in found]}

    def would_fit(self, wish: Wish) -> dict:
        """What could be had instead: the next start, the most machines, the longest duration; each that there is."""
        begin, until = max(wish.held[0], int(self.clock())), wish.held[1]
        need = until - wish.held[0]
        place, amount, offers = wish.resource, wish.amount, {}
        for first, last in free_windows(place, amount, begin, LAST.timestamp()):
            if first == begin and last > wish.start:
                offers['longest'] = format_duration(last - wish.start)
            if last - first >= need:
                offers['next_start'] = instant(int(first) + wish.lead)
                break
        used = peak(place.id, begin, until)
        rooms = [(limit - held) // need_each for limit, held, need_each in zip(capacity(place), used, wish.each)
                 if limit is not None and need_each]
        if rooms and 0 < min(rooms) < wish.vms:
            offers['most_vms'] = min(rooms)
        return {name: offer for name, offer in offers.items() if self.holds_true(wish, name, offer)}

    def holds_true(self, wish: Wish, name: str, offer) -> bool:
        """Whether an offer would be admitted: nothing is offered that wasn't checked by THE RULE."""
        if name == 'next_start':
            start = int(offer.timestamp())
            wish = wish._replace(start=start, end=start + wish.end - wish.start)
        elif name == 'longest':
            wish = wish._replace(end=wish.start + int(parse_duration(offer).total_seconds()))
        else:
            wish = wish._replace(vms=offer)
        return fits(wish.resource, *wish.held, wish.amount)


def hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def actor_of(token: str) -> Actor:
    """Whose token this is; Unauthorized if it is nobody's or revoked."""
    found = row('SELECT user, project, role FROM token WHERE hash = ? AND revoked IS NULL', hashed(token))
    if not found:
        raise Unauthorized('this token is not known or was revoked; an admin makes one with: token add USER')
    return Actor(*found)


# Notices #####################################################################
#
# A notice is written down with the event that it tells of, in the same transaction; the life cycle
# delivers it, at least once, with growing pauses for some days. Webhooks get signed JSON, people
# get mail in the words of the configuration.

GIVE_UP = 3 * 86400  # seconds after which an undeliverable notice is given up

NOTICES = '''SELECT n.id, n.target, n.tries, e.id AS event, e.at, e.actor, e.code, e.sentence, e.reservation_id
               FROM outbox n JOIN event e ON e.id = n.event_id'''


class Undelivered(Error):
    """A notice did not arrive; it may the next time."""


def deliver(config: Config, notice, about: dict) -> None:
    """Delivers one notice to its target; `about` is its reservation as an answer shows it.

    Raises:
      Undelivered: it was not accepted.
    """
    from http.client import HTTPException
    try:
        if re.match('https?://', notice.target):
            body = {'id': notice.event, 'event': notice.code, 'at': instant(notice.at), 'actor': notice.actor,
                    'sentence': notice.sentence, 'reservation': about}
            post(config, notice.target, json_text(body).encode())
        else:
            send_mail(config, notice, about)
    except (OSError, ValueError, HTTPException) as error:  # smtplib's are OSErrors
        raise Undelivered(f'{type(error).__name__}: {error}') from None


def post(config: Config, url: str, body: bytes) -> None:
    """Posts a webhook: signed if there is a secret, no redirects, and only where that is allowed.

    The header X-Cmres-Signature is `sha256=` and the hex HMAC of X-Cmres-Timestamp, a full stop and the body.
    """
    import hmac
    from http.client import HTTPConnection, HTTPSConnection
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == 'https' else 80)
    address = allowed_address(config, parts.hostname, port)
    stamp = str(int(time.time())).encode()
    signature = hmac.new(config.webhook_secret.encode(), stamp + b'.' + body, 'sha256').hexdigest()
    kind = HTTPSConnection if parts.scheme == 'https' else HTTPConnection
    connection = kind(parts.hostname, port, timeout=10)
    # To the address that was checked: the name may mean another one a moment later.
    connection._create_connection = lambda _, *rest: socket.create_connection((address, port), *rest)
    connection.request('POST', parts._replace(scheme='', netloc='').geturl() or '/', body, {
        'Content-Type': 'application/json', 'User-Agent': f'cmres/{__version__}', 'X-Cmres-Timestamp': stamp.decode()}
        | ({'X-Cmres-Signature': f'sha256={signature}'} if config.webhook_secret else {}))
    status = connection.getresponse().status
    connection.close()
    if not 200 <= status < 300:
        raise ValueError(f'the webhook answered {status}; 200 to 299 is taken, and no redirect is followed')


def allowed_address(config: Config, host: str, port: int) -> str:
    """The address of a host; ValueError if any of its addresses is private and that is not allowed."""
    import ipaddress
    found = [ipaddress.ip_address(each[4][0].partition('%')[0])
             for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for each in found:
        public_one = getattr(each, 'ipv4_mapped', None) or each
        if not config.private_addresses and (not public_one.is_global or public_one.is_multicast):
            raise ValueError(f'{host} is at the private address {each}; the setting private_addresses allows that')
    return str(found[0])


def send_mail(config: Config, notice, about: dict) -> None:
    if not config.mail_server:
        raise ValueError('no mail_server is set')
    import smtplib
    from email.message import EmailMessage
    host, _, port = config.mail_server.partition(':')
    message = EmailMessage()
    subject, _, text = notice_text(config, notice, about).partition('\n')
    message['From'], message['To'], message['Subject'] = config.mail_from, notice.target, f'[cmres] {subject}'
    message['Message-ID'] = f'<event-{notice.event}-{notice.id}@cmres>'  # a repeated one is known as such
    message.set_content(f'{text}\n\n{notice.sentence}\n' if notice.sentence not in text else f'{text}\n')
    with smtplib.SMTP(host, int(port or 25), timeout=10) as server:
        server.send_message(message)


def notice_text(config: Config, notice, about: dict) -> str:
    """The words of the configuration for an event, filled with its reservation."""
    template = config.texts[notice.code]
    fields = {name: in_cell(value, config.zone) for name, value in about.items()}
    return template.format_map(defaultdict(str, fields | {'sentence': notice.sentence, 'actor': notice.actor}))


def in_cell(value, zone: ZoneInfo) -> str:
    """A value for people."""
    if isinstance(value, datetime):
        return format_time(value, zone)
    if isinstance(value, dict):
        return ' '.join(f'{name}={in_cell(each, zone)}' for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ', '.join(in_cell(each, zone) for each in value)
    return '-' if value is None else str(value)


def json_text(value) -> str:
    return json.dumps(to_plain(value), ensure_ascii=False) + '\n'


# Life cycle ##################################################################
#
# One idempotent pass, `converge`, makes of what is wanted what is; repeating it is all there is.
# It records the calls that ended, plans servers for what has begun, gives them up for what is
# over, and hands the next calls to workers. One thread thinks and writes; workers only call.
#
# A server is made like this, so that a crash at any point neither loses nor doubles it:
#
#   (1) the intent is written: its row, in state `build`, with a new mark (row and try);
#   (2) the cloud is called, and the mark is part of that call;
#   (3) the answer is written. Where (3) is missing, a look at the cloud finds the server by its
#       mark, or, once it can't come any more, finds that there is none: then from (1), a new mark.
#
# What a server needs next follows from its goal and its state alone; `due` only says when to ask.
# Of several processes one acts, by a lease with a deadline: it is renewed while passes are made, it
# is looked at in every transaction and before every call, and who lost it does nothing more.

UNDER_WAY = {'delete': 'deleting', 'start': 'starting', 'stop': 'stopping', 'shelve': 'shelving', 'snapshot': 'saving'}
DOWN = ('shutoff', 'paused', 'suspended', 'shelved', 'shelved_offloaded')
GONE = ('deleted', 'soft_deleted')  # what Nova may still list for a moment
FINAL = ('deleted', 'kept')  # it is gone, or it stays as its owner wished and is no longer ours to watch
TRIPS = 3  # failures in a row after which a cloud is left alone for a while

SERVERS = '''SELECT v.*, r.flavor, r.image, r.network, r.key, r.security_groups, r.user_data, r.metadata,
                    r.label, r.notify, o.reservation_id, o."end"
               FROM server v JOIN occurrence o ON o.id = v.occurrence_id
               JOIN reservation r ON r.id = o.reservation_id'''


class LostLease(Error):
    """Another scheduler acts now; this one must not."""


class Result(NamedTuple):
    """A call that ended: what for, when, and its answer or its error."""
    key: tuple
    verb: str
    account: str
    target: Any
    began: float
    ended: float
    answer: Any = None
    error: Exception | None = None


class Breaker(NamedTuple):
    """What is remembered of a cloud in trouble: failures in a row, the last one, until when it is left alone."""
    failures: int = 0
    last: float = 0
    until: float = 0
    fault: str = ''


class LifeCycle:
    """Boots what has begun, ends what is over, and looks whether it is so."""

    def __init__(self, config: Config, clouds: Clouds, clock: Callable[[], float] = time.time):
        self.config, self.clouds, self.clock = config, clouds, clock
        self.name = f'{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}'
        self.leased_until = self.latest = 0.0
        self.wake = threading.Event()
        self.flying: dict[tuple, float] = {}  # calls that workers have, and until when they are waited for
        self.results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self.ended: list[Result] = []    # results that are not on disk yet
        self.pools: dict[str, ThreadPoolExecutor] = {}
        self.breakers: dict[str, Breaker] = defaultdict(Breaker)
        self.building: dict[tuple, float] = {}  # since when servers were seen to boot

    # Repeating

    def converge(self, now: float) -> bool:
        """One pass, if this process may act; calls that it begins go on after it and are recorded by a later one."""
        if not self.lead(now):
            self.forget()
            return False
        if now < self.latest - 2:
            log.warning('the clock was set back by %.0f seconds', self.latest - now)
            self.pull_forward(now)
            self.sweep()
        self.latest = now
        self.record(now)
        self.plan(now)
        self.call(now)
        return True

    def settle(self) -> bool:
        """Passes until no call is under way: what `tick` does; false if another scheduler acts."""
        acting = self.converge(self.clock())
        while acting and any(map(self.busy, [*self.flying])):
            self.wake.wait(1)
            self.wake.clear()
            acting = self.converge(self.clock())
        return acting

    def next_due(self, after: float = 0) -> float:
        """When, after an instant, the next pass has something to do; infinity if nothing is planned."""
        found = [row(f'SELECT min(due) AS due FROM {table} WHERE due > ?', after).due
                 for table in ('occurrence', 'server', 'outbox')]
        return min((due for due in found if due is not None), default=float('inf'))

    def run(self, stop: threading.Event) -> None:
        """Passes at every instant that is due, at every change, and at least every second, until `stop` is set."""
        import schedule
        beat = schedule.Scheduler()
        beat.every(1).seconds.do(lambda: None)  # other processes may change the store; clocks may be set
        beat.every(max(int(10 * self.config.sweep), 1)).seconds.do(self.sweep)
        while not stop.is_set():
            wait = self.guarded_pass()
            self.wake.wait(max(min(wait, beat.idle_seconds, 1), 0))  # `schedule` goes by a clock that may be set
            self.wake.clear()
            beat.run_pending()
        self.finish()

    def guarded_pass(self) -> float:
        """One pass that survives whatever happens; the seconds until the next one is due."""
        try:
            now = self.clock()
            if not self.converge(now):
                return 1
            # What is due already while calls are under way waits for one of them, and each of them wakes us.
            return self.next_due(now if self.flying else 0) - self.clock()
        except peewee.DatabaseError as error:
            log.warning('the store is not available: %s; waiting', error)
        except LostLease as error:
            log.warning('%s', error)
        except Exception:  # whatever it is, the next pass may do better; people wait for machines
            log.exception('this pass failed; the next comes in a second')
        return 1

    def finish(self, patience: float = 5) -> None:
        """Lets calls that are under way end and records them; then another scheduler may act at once."""
        until = time.monotonic() + patience
        try:
            while self.flying and time.monotonic() < until and self.lead(self.clock()):
                self.wake.wait(0.1)
                self.wake.clear()
                self.record(self.clock())
            with transaction():
                run('UPDATE lease SET until = 0 WHERE holder = ?', self.name)
        except (peewee.DatabaseError, Error) as error:
            log.warning('could not end in good order: %s', error)
        for pool in self.pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    # Who acts

    def lead(self, now: float) -> bool:
        """Whether this process may act: it has the lease, renews it, or takes one that ran out."""
        if self.leased_until - self.config.lease <= now < self.leased_until - self.config.lease / 2:
            return True
        if self.held_by_another(now):
            self.leased_until = 0.0
            return False
        with transaction():
            now = self.clock()  # we may have been frozen since; nobody else writes from here on
            if self.held_by_another(now):
                return False
            taken_over = not row('SELECT name FROM lease WHERE holder = ?', self.name)
            run('INSERT INTO lease (name, holder, until) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE '
                'SET holder = excluded.holder, until = excluded.until',
                'scheduler', self.name, now + self.config.lease)
        self.leased_until = now + self.config.lease
        if taken_over:  # whoever made the calls that are under way may never tell of them
            self.pull_forward(now)
            self.sweep()
        return True

    def held_by_another(self, now: float) -> bool:
        found = row('SELECT holder, until FROM lease')
        # One that ends further ahead than any lease was made before the clock was set back.
        return bool(found) and found.holder != self.name and now < found.until <= now + 2 * self.config.lease

    @contextmanager
    def acting(self) -> Iterator[None]:
        """A transaction of the process that has the lease; LostLease for any other."""
        with transaction():
            if not row('SELECT name FROM lease WHERE holder = ?', self.name):
                self.leased_until = 0.0
                raise LostLease('another scheduler has taken over; this one waits its turn')
            yield

    def forget(self) -> None:
        """What ended is for the process to find out that acts now."""
        while not self.results.empty():
            self.ended.append(self.results.get())
        self.forget_calls()

    def forget_calls(self) -> None:
        for result in self.ended:
            self.flying.pop(result.key, None)
        self.ended.clear()

    def pull_forward(self, now: float) -> None:
        """Lets nothing wait for an instant that an older clock or another process has reckoned."""
        latest, pause = max(self.latest, now), now + self.config.retry_most
        with self.acting():
            run("UPDATE server SET due = min(due, iif(state = 'planned', ?, ?)), called = min(called, ?) "
                'WHERE due IS NOT NULL', pause, now, now)
            run('UPDATE occurrence SET due = ? WHERE due > ? AND held_from <= ?', now, now, latest)
            run('UPDATE outbox SET due = min(due, ?) WHERE due IS NOT NULL', pause)
        self.breakers.clear()
        self.latest = now

    def sweep(self) -> None:
        """Looks at every account, also for servers of ours that nothing in the store tells of."""
        if self.clock() < self.leased_until:
            for account in self.clouds.accounts():
                self.submit(('look', account), 'look', account, self.known(account))

    # What is wanted

    def plan(self, now: float) -> None:
        """Writes down the servers that occurrences want now, and gives up those they don't."""
        due = ('SELECT o.*, r.label, r.image, r.server, r.at_end, r.notify, r.changed, r.project, s.cloud '
               'FROM occurrence o JOIN reservation r ON r.id = o.reservation_id '
               'JOIN resource s ON s.id = o.resource_id WHERE o.due <= ?')
        if rows(f'{due} LIMIT 1', now):
            with self.acting():
                for occurrence in rows(due, now):
                    self.plan_one(occurrence, now)

    def plan_one(self, occurrence, now: float) -> None:
        over = occurrence.cancelled is not None or now >= occurrence.end
        servers = rows("SELECT id, n, state, ready, borrowed, uid FROM server WHERE occurrence_id = ? AND goal = 'up' "
                       "AND state NOT IN ('deleted', 'kept') ORDER BY n", occurrence.id)
        # Machines that are there stay, also where the clock was set back to before their start.
        runs = (occurrence.image or occurrence.server) and not over and (servers or now >= occurrence.held_from)
        wanted = occurrence.vms if runs else 0
        for n in sorted(set(range(1, wanted + 1)) - {server.n for server in servers}):
            self.plan_server(occurrence, n, now)
        for server in servers:
            if server.n > wanted and server.borrowed and self.handed_on(occurrence, now):
                change(Server, server.id, goal=occurrence.at_end, state='kept', due=None)
            elif server.n > wanted:
                change(Server, server.id, goal=self.goal_after(occurrence, server, over), due=now)
        if over and now >= occurrence.end + self.config.end_grace:
            self.force(occurrence, now)
        told = self.announce(occurrence, over, now)
        change(Occurrence, occurrence.id, told=told, due=self.next_look(occurrence, over, now))

    def plan_server(self, occurrence, n: int, now: float) -> None:
        borrowed = bool(occurrence.server)
        insert(Server, occurrence=occurrence.id, n=n, name=f'{occurrence.label}-{occurrence.id}-{n}',
               account=self.clouds.account(occurrence.cloud, occurrence.project), goal='up', borrowed=borrowed,
               state='unknown' if borrowed else 'planned', uid=occurrence.server or None, tries=0, failures=0,
               addresses='[]', snapshot='', snapshot_id='', fault='',
               # What was asked for after the start can't be ready at the start.
               planned=max(occurrence.start, occurrence.changed), due=now)

    def goal_after(self, occurrence, server, over: bool) -> str:
        """What becomes of a server that is up no longer; one that never was up is not worth keeping."""
        if server.borrowed:
            return occurrence.at_end
        asked = over and occurrence.cancelled is None and server.ready and server.state not in ('error', 'deleting')
        return occurrence.at_end if asked else 'delete'

    def handed_on(self, occurrence, now: float) -> bool:
        """Whether the next reservation of the same machine has begun, so that it must not be stopped between."""
        return bool(row('SELECT o.id FROM occurrence o JOIN reservation r ON r.id = o.reservation_id '
                        'WHERE r.server = ? AND o.id <> ? AND o.cancelled IS NULL AND o.due IS NOT NULL '
                        'AND o.held_from <= ? AND o."end" > ?', occurrence.server, occurrence.id, now, now))

    def force(self, occurrence, now: float) -> None:
        """Deletes after the grace time what could not be stopped, shelved or saved: others were promised its place."""
        late = rows("SELECT id, name FROM server WHERE occurrence_id = ? AND goal <> 'delete' AND NOT borrowed "
                    "AND state NOT IN ('deleted', 'kept')", occurrence.id)
        for server in late:
            change(Server, server.id, goal='delete', state='active', due=now)
            self.journal(now, 'forced', f'{server.name} did not {occurrence.at_end} in time and is deleted', occurrence)

    def announce(self, occurrence, over: bool, now: float) -> int:
        """Tells of a start or an end that comes soon, once; what was told so far."""
        soon, ending = self.notice_times(occurrence)
        if not over and not occurrence.told & SOON and soon <= now < occurrence.start:
            self.journal(now, 'soon', f'starts in {format_duration(occurrence.start - now)}', occurrence)
            return occurrence.told | SOON
        if not over and not occurrence.told & ENDING and ending <= now:
            self.journal(now, 'ending', f'ends in {format_duration(occurrence.end - now)}', occurrence)
            return occurrence.told | ENDING
        return occurrence.told

    def notice_times(self, occurrence) -> tuple[float, float]:
        """When a start and an end are announced; the end of a short window, in its middle."""
        length = occurrence.end - occurrence.start
        return occurrence.start - self.config.notice, occurrence.end - min(self.config.notice, length / 2)

    def next_look(self, occurrence, over: bool, now: float) -> float | None:
        """When an occurrence must be planned again; never, once it is over and nothing is left to do."""
        if not over:
            comes = *self.notice_times(occurrence), occurrence.held_from, occurrence.start, occurrence.end
            return min(each for each in comes if each > now)
        if row("SELECT id FROM server WHERE occurrence_id = ? AND state NOT IN ('deleted', 'kept') LIMIT 1",
               occurrence.id):
            return now + self.config.poll
        if occurrence.cancelled is None:
            self.tell_end(occurrence, now)
        return None

    def tell_end(self, occurrence, now: float) -> None:
        found = row('SELECT count(ready) AS ever, max(fault) AS fault FROM server WHERE occurrence_id = ?',
                    occurrence.id)
        if (occurrence.image or occurrence.server) and not found.ever:
            self.journal(now, 'failed', f"never up: {found.fault or 'the life cycle did not run'}", occurrence)
        else:
            self.journal(now, 'ended', 'its time was over', occurrence)

    def journal(self, now: float, code: str, sentence: str, about) -> None:
        """An event of the life cycle, about a row that tells its reservation and whom to notify."""
        journal(self.config, now, 'cmres', code, sentence[:1000], about.reservation_id, json.loads(about.notify))

    # What to do

    def call(self, now: float) -> None:
        """Hands the calls that are due to workers, each after its intent is written."""
        due = [server for server in rows(f'{SERVERS} WHERE v.due <= ? ORDER BY v.planned, v.id', now)
               if not self.busy(('server', server.id))]
        # Each target is told in order, one notice after another.
        notices = rows(f'{NOTICES} WHERE n.due <= ? AND n.id IN (SELECT min(id) FROM outbox WHERE due IS NOT NULL '
                       'GROUP BY target)', now)
        looks, calls = set(), []
        if due:
            with self.acting():
                for server in due:
                    verb = 'look' if self.left_alone(server, now) else self.next_call(server)
                    looks |= {server.account} if verb == 'look' else set()
                    calls += self.intend(verb, server, now) if verb != 'look' else []
        for verb, server in calls:
            self.submit(('server', server.id), verb, server.account, server)
        for account in looks:
            if self.breakers[account].until <= now:
                self.submit(('look', account), 'look', account, self.known(account))
        for notice in notices:
            self.submit(('notice', notice.target), 'notice', ' notices', notice)

    def left_alone(self, server, now: float) -> bool:
        """Whether a cloud is in such trouble that calls to it wait; a look then finds out whether it is over."""
        breaker = self.breakers[server.account]
        if breaker.failures < TRIPS and breaker.until <= now:
            return False
        change(Server, server.id, due=max(breaker.until, now + self.config.poll), fault=breaker.fault[:500])
        return True

    def next_call(self, server) -> str:
        """What a server needs next."""
        if server.state == 'planned':
            return 'boot' if server.goal == 'up' else 'drop'
        if server.state == UNDER_WAY['snapshot']:
            return 'verify'
        if server.state in UNDER_WAY.values() or not server.uid:
            return 'look'
        if server.goal == 'up' and server.borrowed:
            return 'start' if server.state in DOWN else 'look'
        if server.goal == 'delete' or server.goal == 'up' and server.state == 'error':
            return 'delete'
        ready_for = {'stop': ('active',), 'shelve': ('active', *DOWN[:3]), 'snapshot': ('active', *DOWN[:3])}
        return server.goal if server.state in ready_for.get(server.goal, ()) else 'look'

    def intend(self, verb: str, server, now: float) -> list:
        """Writes what will be done; the calls that it takes."""
        if verb == 'drop':
            change(Server, server.id, state='deleted', deleted=now, due=None)
            return []
        patience = now + self.config.call_timeout + self.config.settle
        if verb == 'boot':
            server = server._replace(tries=server.tries + 1)
            change(Server, server.id, state='build', tries=server.tries, uid=None, begun=server.begun or now,
                   called=now, due=patience)
        else:
            change(Server, server.id, due=patience)
        return [(verb, server)]

    def known(self, account: str) -> list[str]:
        """The servers that must be there on an account."""
        return [each.uid for each in rows("SELECT uid FROM server WHERE account = ? AND due IS NOT NULL "
                                          "AND uid IS NOT NULL AND (goal = 'up' OR borrowed)", account)]

    def submit(self, key: tuple, verb: str, account: str, target) -> None:
        if self.busy(key):
            return
        self.flying[key] = deadline = time.monotonic() + self.config.call_timeout + self.config.settle
        if account not in self.pools:  # one pool an account: a cloud that hangs holds nobody else's workers
            self.pools[account] = ThreadPoolExecutor(self.config.workers, thread_name_prefix=account)
        self.pools[account].submit(self.work, deadline, key, verb, account, target)

    def busy(self, key: tuple) -> bool:
        """Whether a call is under way; one that takes much longer than it may is not waited for: a look decides."""
        return self.flying.get(key, 0) > time.monotonic()

    def work(self, deadline: float, key: tuple, verb: str, account: str, target) -> None:
        """A worker's whole job: one call, if it is not too late for it, and its result for the next pass."""
        began = self.clock()
        try:
            if began >= self.leased_until or time.monotonic() >= deadline:
                raise LostLease('the time for this call ran out before it began')
            answer, error = getattr(self, f'do_{verb}')(account, target), None
        except Exception as caught:  # the pass that records it decides what it means
            answer, error = None, caught
        self.results.put(Result(key, verb, account, target, began, self.clock(), answer, error))
        self.wake.set()

    def do_boot(self, account: str, server) -> str:
        return self.clouds.open(account).boot(Machine(
            server.name, self.mark(server), server.flavor, server.image, server.network, server.key,
            tuple(json.loads(server.security_groups)), server.user_data, json.loads(server.metadata)))

    def do_delete(self, account: str, server) -> None:
        self.clouds.open(account).delete(server.uid)

    def do_start(self, account: str, server) -> None:
        self.clouds.open(account).start(server.uid)

    def do_stop(self, account: str, server) -> None:
        self.clouds.open(account).stop(server.uid)

    def do_shelve(self, account: str, server) -> None:
        self.clouds.open(account).shelve(server.uid)

    def do_snapshot(self, account: str, server) -> tuple[str, str]:
        name = f'{server.name}-{instant(server.end):%Y%m%dT%H%M%S}'
        return name, self.clouds.open(account).snapshot(server.uid, name)

    def do_verify(self, account: str, server) -> bool | None:
        return self.clouds.open(account).saved(server.snapshot_id)

    def do_look(self, account: str, known: list[str]) -> tuple[list[Seen], set[str]]:
        """The servers with our marks, and those of the known ones that are gone for sure.

        Nova lists a server without its tags for a moment between its build request and its cell, so
        that one which must be there is asked for by its id before it is taken for gone.
        """
        cloud = self.clouds.open(account)
        seen = [each for each in cloud.servers() if each.state not in GONE]
        unseen = sorted(set(known) - {each.uid for each in seen})[:100]  # the others' turn comes with the next look
        found = {uid: cloud.server(uid) for uid in unseen}
        gone = {uid for uid, each in found.items() if each is None or each.state in GONE}
        return seen + [found[uid] for uid in unseen if uid not in gone], gone

    def do_clear(self, account: str, uid: str) -> None:
        self.clouds.open(account).delete(uid)

    def do_notice(self, account: str, notice) -> None:
        found = listing(self.clock(), 'r.id = ?', (notice.reservation_id,)) if notice.reservation_id else []
        deliver(self.config, notice, public(found[-1]) if found else {})

    def mark(self, server) -> str:
        return f'{self.clouds.store}-{server.id}-{server.tries}'

    # What became of it

    def record(self, now: float) -> None:
        """Writes down the results of the calls that ended since the last pass; they wait until that has worked."""
        while not self.results.empty():
            result = self.results.get()
            # The clock may have been set back since.
            self.ended.append(result._replace(began=min(result.began, now), ended=min(result.ended, now)))
        if not self.ended:
            return
        breakers = dict(self.breakers)
        with self.acting():
            for result in self.ended:
                self.note_health(result, now)
                if result.error and not isinstance(result.error, Error):
                    log.error('%s of %s failed', result.verb, result.target, exc_info=result.error)
                self.record_alone(result, now)
        for account in breakers.keys() | self.breakers.keys():
            self.tell_health(account, breakers.get(account, Breaker()), self.breakers[account])
        self.forget_calls()

    def record_alone(self, result: Result, now: float) -> None:
        """Records one result; one that can't be recorded costs the others nothing, and a look finds out later."""
        try:
            with db.atomic():
                self.record_one(result, now)
        except (peewee.DatabaseError, LostLease):
            raise
        except Exception:
            log.exception('the result of %s for %s could not be recorded', result.verb, result.account)

    def record_one(self, result: Result, now: float) -> None:
        if result.key[0] != 'server':
            getattr(self, f'record_{result.verb}')(result, now)
            return
        server = row(f'{SERVERS} WHERE v.id = ?', result.target.id)
        if server.state in FINAL or server.tries != result.target.tries:
            return
        if isinstance(result.error, LostLease):
            change(Server, server.id, due=now, **({'state': 'planned'} if result.verb == 'boot' else {}))
        elif result.verb == 'boot':
            self.record_boot(server, result, now)
        elif result.error:
            self.put_off(server, self.fault(result.error), now, self.retry_after(result.error), called=result.ended)
        elif result.verb == 'verify':
            self.record_verify(server, result.answer, now)
        else:
            saved = dict(zip(('snapshot', 'snapshot_id'), result.answer)) if result.verb == 'snapshot' else {}
            change(Server, server.id, state=UNDER_WAY[result.verb], called=result.ended,
                   due=now + self.config.poll, **saved)

    def record_boot(self, server, result: Result, now: float) -> None:
        begun = result.began if server.tries == 1 else server.begun
        error = result.error
        if not error:
            due = now + self.config.poll if server.goal == 'up' else now
            change(Server, server.id, uid=result.answer, begun=begun, called=result.ended, due=due)
        elif isinstance(error, Error) and getattr(error, 'sure', True):
            self.put_off(server, str(error), now, self.retry_after(error), state='planned', begun=begun,
                         called=result.ended)
        elif not server.uid:  # a look has not found it yet
            self.tell_trouble(server, self.fault(error), now)
            change(Server, server.id, fault=self.fault(error)[:500], begun=begun, called=result.ended,
                   due=result.ended + self.config.settle)

    def record_verify(self, server, complete: bool | None, now: float) -> None:
        if complete:
            self.journal(now, 'snapshot', f'{server.name} is saved as the image {server.snapshot}', server)
            change(Server, server.id, goal='delete', state='active', due=now)
        elif complete is None:
            self.put_off(server, f'the image {server.snapshot} was not completed', now, state='active')
        else:
            change(Server, server.id, due=now + self.config.poll)

    def put_off(self, server, fault: str, now: float, at_least: float = 0, **values) -> None:
        """Tries again after a pause that grows with each failure in a row."""
        failures = server.failures + 1
        change(Server, server.id, failures=failures, fault=fault[:500],
               due=now + max(self.pause(failures), at_least), **values)
        self.tell_trouble(server, fault, now)

    def tell_trouble(self, server, fault: str, now: float) -> None:
        if not server.failures or fault[:500] != server.fault:
            self.journal(now, 'trouble', f'{server.name}: {fault}', server)

    def pause(self, failures: int) -> float:
        most = min(self.config.retry_first * 2 ** min(failures - 1, 20), self.config.retry_most)
        return most * random.uniform(0.8, 1.2)

    def retry_after(self, error: Exception) -> float:
        """The seconds that a cloud asks us to wait; 0 if it doesn't."""
        text = getattr(error, 'details', {}).get('retry_after') or '0'
        return min(float(text), 3600) if re.fullmatch(r'[0-9]{1,9}', str(text)) else 0

    def fault(self, error: Exception) -> str:
        return str(error) if isinstance(error, Error) else f'{type(error).__name__}: {error}'

    def note_health(self, result: Result, now: float) -> None:
        """Counts a cloud's failures in a row; after some it is left alone, longer and longer."""
        before, error = self.breakers[result.account], result.error
        if not (isinstance(error, CloudError) and error.ill):
            if not isinstance(error, LostLease) and result.ended > before.until:
                self.breakers[result.account] = Breaker()
            return
        # Calls that fail side by side are one failure: they met the same moment.
        failures = before.failures + (result.began > before.last)
        pause = self.pause(failures - TRIPS + 1) if failures >= TRIPS else 0
        until = now + max(pause, self.retry_after(error))
        self.breakers[result.account] = Breaker(
            failures, max(before.last, result.ended), max(before.until, until), str(error))

    def tell_health(self, account: str, before: Breaker, after: Breaker) -> None:
        if before.failures < TRIPS <= after.failures:
            log.warning('the cloud %s is in trouble and is left alone for a while', account)
        if after.failures < TRIPS <= before.failures:
            log.warning('the cloud %s is well again', account)

    def record_clear(self, result: Result, now: float) -> None:
        if result.error:
            log.warning('could not remove the server %s that nothing wants: %s', result.target, result.error)

    def record_notice(self, result: Result, now: float) -> None:
        notice, error = result.target, result.error
        if not error:
            change(Outbox, notice.id, due=None, fault='')
        elif now - notice.at > GIVE_UP:
            change(Outbox, notice.id, due=None, fault=f'given up: {error}'[:500])
            log.warning('gave up telling %s of event %s: %s', notice.target, notice.event, error)
        else:
            tries = notice.tries + 1
            change(Outbox, notice.id, tries=tries, due=now + self.pause(tries), fault=str(error)[:500])

    def record_look(self, result: Result, now: float) -> None:
        """Compares what a cloud shows with what is written."""
        account = result.account
        if result.error:
            pause = now + max(self.config.poll, self.config.retry_first)
            run('UPDATE server SET due = max(due, ?) WHERE account = ? AND due <= ?',
                pause, account, pause)
            return
        answer, gone = result.answer
        seen = {each.uid: each for each in answer}
        marked = {each.mark: each for each in reversed(seen.values()) if each.mark}
        wanted = set()
        for server in rows(f"{SERVERS} WHERE v.state <> 'deleted' AND (v.tries > 0 OR v.borrowed)"):
            found = seen.get(server.uid) or (None if server.borrowed else marked.get(self.mark(server)))
            if found:
                wanted.add(found.uid)
            if server.state in FINAL:
                continue
            if found:
                self.record_seen(server, found, now)
            elif server.account == account and (server.uid in gone or not server.uid or server.goal != 'up'
                                                and not server.borrowed):
                self.record_missing(server, result.began, now)
        run("UPDATE server SET due = ? WHERE account = ? AND goal = 'up' AND state = 'active'",
            now + self.config.sweep, account)
        self.tell_ready(account, now)
        for uid in seen.keys() - wanted:
            if seen[uid].mark and now - seen[uid].made >= self.config.orphan_grace:
                self.submit(('clear', uid), 'clear', account, uid)

    def record_seen(self, server, seen: Seen, now: float) -> None:
        """A server that is there: adopt it, and go on from the state that it is in."""
        if server.state in UNDER_WAY.values() and not self.arrived(server.state, seen.state):
            stuck = now >= server.called + self.config.call_timeout  # then it is asked once more
            state = ('error' if server.state == 'deleting' else seen.state) if stuck else server.state
            change(Server, server.id, state=state, due=now if stuck else now + self.config.poll)
        elif server.goal == 'up' and seen.state == 'active':
            self.building.pop((server.id, server.tries), None)
            if server.state != 'active' or server.addresses != json.dumps(seen.addresses):
                change(Server, server.id, uid=seen.uid, state='active', ready=server.ready or now, fault='', failures=0,
                       addresses=json.dumps(seen.addresses))
        elif server.goal in ('stop', 'shelve') and self.arrived(UNDER_WAY[server.goal], seen.state):
            change(Server, server.id, uid=seen.uid, state='kept', due=None)
            self.journal(now, 'stopped', f'{server.name} is {seen.state} and stays', server)
        elif server.goal == 'up' and seen.state == 'build' and self.too_slow(server):
            late = f'it did not come up within {format_duration(self.config.boot_timeout)}'
            change(Server, server.id, uid=seen.uid, state='error', fault=late, due=now)
        else:
            later = now + self.config.poll
            known = server.uid and server.state == seen.state  # then its instant is set already
            calls = self.next_call(server._replace(uid=seen.uid, state=seen.state)) != 'look'
            change(Server, server.id, uid=seen.uid, state=seen.state, fault=seen.fault[:500] or server.fault,
                   due=max(server.due or 0, later) if known else now if calls else later)

    def too_slow(self, server) -> bool:
        """Whether this process has seen a server boot for too long; by a clock that nobody sets."""
        first = self.building.setdefault((server.id, server.tries), time.monotonic())
        return time.monotonic() >= first + self.config.boot_timeout

    def arrived(self, under_way: str, state: str) -> bool:
        """Whether a cloud's state is what was asked for."""
        return state in {'starting': ('active',), 'stopping': DOWN, 'shelving': DOWN[3:]}.get(under_way, ())

    def record_missing(self, server, looked: float, now: float) -> None:
        """A server that the look didn't show: gone, never made, or too new to be in it."""
        called = server.called or 0
        if server.state == 'planned':
            return
        if self.busy(('server', server.id)) or looked <= called:
            return
        if not server.uid and looked < called + self.config.settle:
            change(Server, server.id, due=called + self.config.settle)
        elif server.goal != 'up':
            change(Server, server.id, state='deleted', deleted=now, due=None)
        elif server.borrowed:
            self.put_off(server, 'the server is not there any more', now, state='unknown')
        elif server.state in ('error', 'deleting') or not server.uid:
            self.put_off(server, server.fault or 'it was never made', now, state='planned', uid=None)
        else:
            change(Server, server.id, state='planned', uid=None, fault='it vanished from the cloud', due=now)
            self.journal(now, 'vanished', f'{server.name} vanished from the cloud', server)

    def tell_ready(self, account: str, now: float) -> None:
        """Announces, once each, the occurrences all of whose servers are up."""
        for each in rows("""SELECT o.id, o.start, o.told, o.reservation_id, r.notify,
                                   count(*) AS up, max(v.ready) AS ready,
                                   group_concat(v.name || ' ' || trim(replace(v.addresses, '"', ''), '[]'), ', ')
                                   AS servers
                              FROM occurrence o JOIN reservation r ON r.id = o.reservation_id
                              JOIN server v ON v.occurrence_id = o.id
                             WHERE o.due IS NOT NULL AND o.told & ? = 0 AND v.account = ? AND v.goal = 'up'
                               AND v.state = 'active' GROUP BY o.id HAVING count(*) >= o.vms""", READY, account):
            change(Occurrence, each.id, told=each.told | READY)
            late = format_duration(max(each.ready - each.start, 0))
            self.journal(now, 'ready', f'all {each.up} are up, {late} after the start: {each.servers}', each)


# REST ########################################################################
#
# Routes come from the marks of the service. One wrapper reads, calls and answers; it and the
# error handler below it are the only places that know statuses. All answers are JSON.

BASE = '/cm/v1.0'
MOST_BODY = 2**20  # bytes


def rest(service: Reservations):
    """The WSGI application that answers for a service."""
    import bottle
    app = bottle.Bottle()
    app.uninstall('json')  # it knows neither lists nor instants
    app.default_error_handler = lambda failure: error_text(failure, bottle.request, bottle.response)
    app.add_hook('before_request', lambda: plain_path(bottle.request.environ))
    for operation in API.values():
        for verb, path, fixed in operation.routes:
            app.route((BASE + path).rstrip('/'), verb, handler(service, operation, fixed))
    app.route('/healthz', 'GET', healthy)
    app.route('/openapi.json', 'GET', handler(service, None, {}))
    return app


def handler(service: Reservations, operation: Operation | None, fixed: dict) -> Callable:
    """Answers one address: who asks, what is asked, the call, its answer in JSON."""
    import bottle

    def handle(**path):
        try:
            acting = service.acting(actor_of(bearer(bottle.request)))
            if operation is None:
                return reply(200, openapi())
            given = given_once(read_query(bottle.request), read_body(bottle.request), path, fixed)
            bound = bind(operation, given, acting.here)
            answer = getattr(acting, operation.name)(**bound)
        except Error as error:
            return reply(error.status, error_body(error))
        except peewee.DatabaseError as error:
            return reply(503, error_body(Unavailable(f'the store is not available: {error}; try again')))
        made = operation.name.rsplit('_')[-1] in ('add', 'load', 'generate') and not bound.get('dry_run')
        return reply(201 if made else 200, answer)

    def reply(status: int, body):
        headers = {'WWW-Authenticate': 'Bearer'} if status == 401 else {}
        for field, kind in (('label', 'reservation'), ('name', 'resource')):
            if status == 201 and field in body:
                headers['Location'] = f'{BASE}/{kind}/{body[field]}'
        return bottle.HTTPResponse(json_text(body), status, {'Content-Type': 'application/json', **headers})
    return handle


def healthy():
    """Says that requests are answered and the store can be read; the one address that needs no token."""
    import bottle
    try:
        row('SELECT 1 AS one')
        return bottle.HTTPResponse('{"status": "ok"}\n', 200, {'Content-Type': 'application/json'})
    except peewee.DatabaseError as error:
        return bottle.HTTPResponse(json_text({'error': f'the store is not available: {error}'}), 503,
                                   {'Content-Type': 'application/json'})


def error_body(error: Error) -> dict:
    return {'error': str(error), 'kind': type(error).__name__} | ({'details': error.details} if error.details else {})


def error_text(failure, request, response) -> str:
    """The JSON of what never reached a handler: no such address, wrong verb, a bug."""
    response.content_type = 'application/json'
    allow = failure.headers.get('Allow')
    sentences = {404: f'there is nothing at {request.path}; /openapi.json lists all addresses',
                 405: f"{request.method} is not for this address; use {' or '.join((allow or '').split(','))}"}
    if failure.status_code == 500:
        log.error('%s %s failed', request.method, request.path, exc_info=failure.exception)
    return json_text({'error': sentences.get(failure.status_code, f'{failure.body}'.lower())})


def plain_path(environ: dict) -> None:
    """The address without its last slash; refuses one that is not UTF-8."""
    import bottle
    try:
        environ['bottle.raw_path'].encode('latin1').decode('utf8')
    except UnicodeDecodeError:
        raise bottle.HTTPError(400, 'the address is not UTF-8') from None
    environ['PATH_INFO'] = environ['PATH_INFO'].rstrip('/') or '/'


def bearer(request) -> str:
    scheme, _, token = request.environ.get('HTTP_AUTHORIZATION', '').partition(' ')
    if scheme.lower() != 'bearer' or not token:
        raise Unauthorized('a token is needed: Authorization: Bearer TOKEN; an admin makes one with: token add USER')
    return token.strip()


def read_query(request) -> dict:
    from urllib.parse import parse_qsl
    try:
        pairs = parse_qsl(request.query_string, keep_blank_values=True, errors='strict', max_num_fields=100)
    except (UnicodeDecodeError, ValueError):
        raise Invalid('the query is not UTF-8 or has more than 100 fields') from None
    return given_once(*({name: value} for name, value in pairs))


def read_body(request) -> dict:
    if (request.content_length or 0) > MOST_BODY or len(text := request.body.read(MOST_BODY + 1)) > MOST_BODY:
        raise TooLarge(f'the body is larger than {MOST_BODY} bytes; send it in parts')
    if not text.strip():
        return {}
    try:
        body = json.loads(text.decode('utf8'), object_pairs_hook=lambda pairs: given_once(*({k: v} for k, v in pairs)))
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError:
        raise Invalid('the body is not UTF-8') from None
    except (ValueError, RecursionError) as error:
        raise Invalid(f'the body is not JSON: {error}') from None
    if not isinstance(body, dict):
        raise Invalid(f'the body must be a JSON object such as {{"label": "lab"}}, not {shown(body)}')
    return body


def given_once(*sources: dict) -> dict:
    """All arguments together; refuses one that comes twice with different values."""
    given: dict = {}
    for source in sources:
        for name, value in source.items():
            if name in given and given[name] != value:
                raise Invalid(f'{name} is given twice: {shown(given[name])} and {shown(value)}')
            given[name] = value
    return given


SCHEMAS = {int: {'type': 'integer'}, bool: {'type': 'boolean'}, Count: {'type': 'integer', 'minimum': 1},
           Most: {'oneOf': [{'type': 'integer', 'minimum': 0}, {'const': 'unlimited'}]},
           Label: {'type': 'string', 'pattern': '^[A-Za-z0-9._-]{1,64}$'},
           Names: {'type': 'array', 'items': {'type': 'string'}},
           Pairs: {'type': 'object', 'additionalProperties': {'type': 'string'}},
           Rows: {'type': 'array', 'items': {'type': 'object'}}}


def openapi() -> dict:
    """OpenAPI 3.1 of all operations, out of the same signatures that read the arguments."""
    paths: dict = defaultdict(dict)
    for operation in API.values():
        for number, (verb, path, fixed) in enumerate(operation.routes):
            named = re.findall(r'<(\w+)>', path)
            fields = {name: each for name, each in operation.parameters.items() if name not in (*named, *fixed)}
            entry = {'operationId': operation.name + (f'_{number}' if number else ''), 'summary': operation.summary,
                     'parameters': [openapi_parameter(name, operation.parameters[name], 'path') for name in named],
                     'responses': {'200': {'description': 'done'},
                                   'default': {'description': 'refused: {"error": "..."}'}}}
            if verb in ('POST', 'PATCH'):
                entry['requestBody'] = {'content': {'application/json': {'schema': openapi_object(fields)}}}
            else:
                entry['parameters'] += [openapi_parameter(name, each, 'query') for name, each in fields.items()]
            paths[(BASE + path).replace('<', '{').replace('>', '}')][verb.lower()] = entry
    return {'openapi': '3.1.0', 'info': {'title': 'cmres', 'version': __version__}, 'paths': paths,
            'components': {'securitySchemes': {'token': {'type': 'http', 'scheme': 'bearer'}}},
            'security': [{'token': []}]}


def openapi_parameter(name: str, parameter, place: str) -> dict:
    return {'name': name, 'in': place, 'required': place == 'path', 'description': WORDS[name],
            'schema': SCHEMAS.get(parameter.annotation, {'type': 'string'})}


def openapi_object(fields: dict) -> dict:
    return {'type': 'object', 'additionalProperties': False,
            'properties': {name: SCHEMAS.get(each.annotation, {'type': 'string'}) | {'description': WORDS[name]}
                           for name, each in fields.items()},
            'required': [name for name, each in fields.items() if each.default is each.empty]}


# Client ######################################################################


class Client:
    """A cmres server as if it were here: the methods, signatures, answers and errors of Reservations.

    Args:
      url: where the server is, such as http://127.0.0.1:8080
      token: as `token add` printed it
      timeout: seconds to wait for an answer
    """

    def __init__(self, url: str, token: str, timeout: float = 60):
        self.url, self.token, self.timeout = url.rstrip('/'), token, timeout

    def call(self, operation: Operation, given: dict):
        """One operation over HTTP.

        Raises:
          Error: the same kinds as the service; Unavailable if there is no answer.
        """
        from urllib.error import HTTPError, URLError
        from urllib.request import Request, urlopen
        verb, address, body = self.address(operation, to_plain(given))
        request = Request(self.url + address, body, {'Authorization': f'Bearer {self.token}'}, method=verb)
        if body:
            request.add_header('Content-Type', 'application/json')
        try:
            with urlopen(request, timeout=self.timeout) as answer:
                return from_plain(json.load(answer))
        except HTTPError as error:
            raise self.refusal(error) from None
        except (URLError, OSError, ValueError) as error:
            raise Unavailable(f"no answer from {self.url}: {getattr(error, 'reason', error)}") from None

    def address(self, operation: Operation, given: dict) -> tuple[str, str, bytes | None]:
        """The verb, the first of the addresses whose parts are all given, and the body."""
        from urllib.parse import quote, urlencode
        given = {name: value for name, value in given.items() if value is not None}
        verb, path, _ = next(each for each in operation.routes
                             if set(re.findall(r'<(\w+)>', each[1])) <= given.keys() and not each[2])
        path = re.sub(r'<(\w+)>', lambda part: quote(str(given.pop(part[1])), safe=''), path)
        if verb in ('POST', 'PATCH'):
            return verb, BASE + path, json.dumps(given).encode()
        query = {name: ','.join(value) if isinstance(value, list) else value for name, value in given.items()}
        return verb, BASE + path + (f'?{urlencode(query)}' if query else ''), None

    def refusal(self, answer) -> Error:
        """The error that the server sent, of the same kind; something else's words if it wasn't cmres."""
        try:
            body = json.load(answer)
            return ERRORS.get(body.get('kind'), Error)(body['error'], **from_plain(body.get('details', {})))
        except (ValueError, KeyError, AttributeError):
            return Unavailable(f'{self.url} answered {answer.status} {answer.reason}, which is not cmres')


def client_method(operation: Operation) -> Callable:
    @functools.wraps(operation.method)
    def method(self, *args, **kwargs):
        given = inspect.signature(operation.method).bind(self, *args, **kwargs).arguments
        return self.call(operation, {name: value for name, value in given.items()
                                     if name != 'self' and value != operation.parameters[name].default})
    return method


for _operation in API.values():
    setattr(Client, _operation.name, client_method(_operation))


# Command line ################################################################
#
# Fire finds the command and its arguments; what it calls only notes the call, and the call is made
# when the whole line has been understood: a line with a mistake does nothing. Values stay the text
# that was typed until `bind` reads them.

GROUPS = {'resource': """What can be reserved: places and their capacities.

Example:
  python cmres.py resource add india --cloud simulated --vms 40
""", 'token': """Who may use the REST interface.

Example:
  python cmres.py token add eva --project biology --role user
"""}

HELP = '''Reservations for virtual machines on OpenStack clouds.

Works on the local database, or with CMRES_URL and CMRES_TOKEN on a server.
Options may stand anywhere; every command also takes --config FILE, --format table|json|csv|yaml and --tz ZONE.
Exit codes: 0 done, 1 refused or failed, 2 wrong use.

Example:
  python cmres.py serve
  python cmres.py add lab demo +10s +1h --vms 3 --flavor m1.small --image cirros
  python cmres.py list
'''

FORMATS = ('table', 'json', 'csv', 'yaml')

#: What a table shows of answers that have more fields than a line has room for.
COLUMNS = {'list': 'id label user project resource vms flavor start end state fault',
           'delete': 'id label user project resource vms start end state',
           'servers': 'n name state addresses planned begun ready deleted snapshot fault',
           'resource_list': 'name cell cloud region aggregate vms vcpus ram',
           'refused': 'line label error'}


def serve(config: Config, host: Name = '', port: int = None, noscheduler: bool = False) -> None:
    """Serves REST, and unless --noscheduler runs the life cycle too, until it is stopped.

    An empty store gets the resource `demo` and a token for an admin, both shown once.

    Example:
      python cmres.py serve --port 8080
    """
    import waitress
    in_utc()
    config = dataclasses.replace(config, host=host or config.host, port=config.port if port is None else port)
    service = local_service(config)
    cycle = LifeCycle(config, service.clouds)
    service.wake = cycle.wake.set
    try:
        server = waitress.create_server(
            rest(service), host=config.host, port=config.port, threads=config.threads, connection_limit=1000,
            asyncore_use_poll=True, max_request_body_size=8 * MOST_BODY, ident=None, clear_untrusted_proxy_headers=True)
    except (OSError, ValueError) as error:
        raise Unavailable(f"can't listen on {config.host}:{config.port}: {error}; choose another with --port") from None
    url = f'http://{config.host}:{getattr(server, "effective_port", config.port)}'
    print(f'cmres {__version__} serves {url} from {config.database}', *welcome(service, url), sep='\n', flush=True)
    with running(cycle if not noscheduler else None):
        server.run()
        server.close()


def scheduler(config: Config) -> None:
    """Runs the life cycle alone, until it is stopped: boots what begins, deletes what is over.

    Example:
      python cmres.py scheduler
    """
    in_utc()
    service = local_service(config)
    print(f'cmres {__version__} runs the life cycle of {config.database}', flush=True)
    with running(LifeCycle(config, service.clouds)) as stop:
        stop.wait()


def tick(config: Config) -> None:
    """Makes one pass of the life cycle: for a line of cron such as `* * * * *`.

    Begins what is due, waits for the clouds' answers and records them. Does nothing while another
    scheduler acts.

    Example:
      python cmres.py tick
    """
    service = local_service(config)
    LifeCycle(config, service.clouds).settle()


LOCAL = {each.__name__: Operation(each.__name__, each, ADMIN, [('POST', '', {})]) for each in (serve, scheduler, tick)}
WORDS |= {'host': 'address to listen on', 'port': 'port to listen on; 0 takes a free one',
          'noscheduler': 'leave the life cycle to another process'}


def in_utc() -> None:
    """`schedule` reckons in local time, which stands still for an hour when summer ends."""
    os.environ['TZ'] = 'UTC'
    time.tzset()
    logging.basicConfig(level=logging.INFO, format='%(asctime)sZ %(levelname)s %(message)s', stream=sys.stderr)
    logging.getLogger('waitress.queue').setLevel(logging.ERROR)  # it warns at every request that waits


@contextmanager
def running(cycle: LifeCycle | None) -> Iterator[threading.Event]:
    """Runs a life cycle beside what follows; SIGTERM and Ctrl-C end both in good order."""
    stop = threading.Event()

    def leave(*_):
        stop.set()
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    thread = threading.Thread(target=cycle.run, args=(stop,), name='life cycle') if cycle else None
    try:
        if thread:
            thread.start()
        yield stop
    finally:
        stop.set()
        if thread:
            cycle.wake.set()
            thread.join()


def local_service(config: Config) -> Reservations:
    """The service on the local database; whoever can write that file acts as admin."""
    open_store(config.database)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = str(os.getuid())
    return Reservations(config, Clouds(config), Actor(user, 'default', ADMIN), progress=progress_bar)


def welcome(service: Reservations, url: str) -> list[str]:
    """Furnishes an empty store, and tells so."""
    lines = []
    if not service.resource_list():
        service.resource_add('demo', cloud='simulated', vms=16)
        lines.append("Made the resource 'demo': 16 vms on the built-in cloud 'simulated'.")
    if not service.token_list():
        token = service.token_add(service.actor.user, service.actor.project, ADMIN)['token']
        lines += [f'Made a token for {service.actor.user}, who is admin; it is shown only now: {token}',
                  'Try:', f"  curl -H 'Authorization: Bearer {token}' {url}{BASE}/resource/"]
    return lines


class Call:
    """A command that was understood but not made yet; it has no members that Fire could go on to."""

    def __init__(self, operation: Operation, given: dict):
        self._operation, self._given = operation, given

    def __dir__(self):
        return []


class Group:
    """Commands under a name; Fire sees those and nothing else."""

    def __init__(self, summary: str, commands: dict):
        self.__dict__.update(commands, __doc__=summary)

    def __dir__(self):
        return [name for name in self.__dict__ if name != '__doc__']


class Untyped(str):
    """The default of an argument as help shows it; what is this was not typed."""


def command(operation: Operation, helping: bool) -> Callable:
    """What Fire calls for an operation: the same signature and help, but it only notes the call.

    Unless Fire is to show help, nothing is required: what is missing is for `bind` to say.
    """
    def note(*args, **kwargs):
        typed = note.__signature__.bind(*args, **kwargs).arguments
        return Call(operation, {name: value for name, value in typed.items() if not isinstance(value, Untyped)})
    note.__signature__ = inspect.Signature([
        each.replace(annotation=REQUIRED, default=REQUIRED if helping and each.default is REQUIRED
                     else Untyped('' if each.default in (None, (), REQUIRED) else each.default))
        for each in operation.parameters.values()])
    words = ''.join(f'\n  {name}: {WORDS[name]}' for name in operation.parameters)
    note.__doc__ = inspect.getdoc(operation.method) + (f'\n\nArgs:{words}' if words else '')
    note.__name__, note.operation = operation.name, operation
    return note


def commands(helping: bool = False) -> Group:
    """The tree of all commands: those of the service, and those of this machine."""
    tree: dict = {name: command(operation, helping) for name, operation in LOCAL.items()}
    groups: dict = defaultdict(dict)
    for name, operation in API.items():
        group, _, verb = name.partition('_')
        (groups[group] if group in GROUPS else tree)[verb if group in GROUPS else name] = command(operation, helping)
    return Group(HELP, tree | {name: Group(GROUPS[name], members) for name, members in groups.items()})


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and tells its exit code."""
    options, zone = {}, UTC
    try:
        argv = take_options(list(sys.argv[1:] if argv is None else argv), options)
        config = load_config(options.get('config'))
        config = dataclasses.replace(config, timezone=options.get('tz', config.timezone))
        zone = config.zone
        run_fire(argv, lambda call: make(call, config, options) if isinstance(call, Call) else call)
        return 0
    except Error as error:
        print('\n'.join(in_words(error, zone)), file=sys.stderr)
        return 2 if isinstance(error, Invalid) else 1
    except peewee.DatabaseError as error:
        print(f'cmres: the store is not available: {error}; try again', file=sys.stderr)
        return 1
    except SystemExit as leaving:  # Fire's way to end: 0 after help, 2 after a mistake
        return leaving.code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads us has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def take_options(argv: list[str], options: dict) -> list[str]:
    """Takes the options of every command out of a line; `add --file F` becomes `load F`."""
    rest, words = [], iter(argv)
    for word in words:
        name, equals, value = word.partition('=')
        if name in ('--config', '--format', '--tz') or name == '--file' and rest[:1] == ['add']:
            value = value if equals else next(words, None)
            if not value:
                raise Invalid(f'{name} needs a value')
        if name in ('--config', '--format', '--tz'):
            options[name[2:]] = value
        elif name == '--file' and rest[:1] == ['add']:
            rest = ['load', value, *rest[1:]]
        elif word == '--follow' and rest[:1] == ['events']:
            options['follow'] = True
        else:
            rest.append(word)
    if options.get('format', 'table') not in FORMATS:
        raise Invalid(f"--format: '{options['format']}' is none of {', '.join(FORMATS)}")
    return rest


def run_fire(argv: list[str], finish: Callable) -> None:
    """Lets Fire read a line; `finish` makes of the call it noted what is printed."""
    import fire
    from contextlib import redirect_stderr
    os.environ['PAGER'] = 'cat'
    fire.parser.DefaultParseValue = str  # else gpu#1, 1e3 and 2026 are guessed to be Python
    if argv[:1] in ([], ['help'], ['-h']):
        argv = [*argv[1:], '--help']
    helping = '--help' in argv
    tree = commands(helping)
    path, here = command_path(tree, argv)
    if helping or isinstance(here, Group):
        with redirect_stderr(sys.stdout):
            fire.Fire(tree, path + ['--', '--help'], 'cmres', finish)
    # Fire's own flags, such as --interactive, are not ours to offer; a lone `-` is a word of ours.
    fire.Fire(tree, path + plain_flags(here.operation, argv[len(path):]) + ['--', '--separator=\0'], 'cmres', finish)


def command_path(tree: Group, argv: list[str]) -> tuple[list[str], Any]:
    """The words of a line that name its command, and that command; refuses an unknown one with the nearest."""
    path, here = [], tree
    for word in argv:
        if not isinstance(here, Group) or word == '--help':
            break
        if word not in dir(here):
            raise Invalid(f"there is no command '{' '.join([*path, word])}'{nearest(word, dir(here))}")
        path, here = [*path, word], getattr(here, word)
    return path, here


def plain_flags(operation: Operation, words: list[str]) -> list[str]:
    """The words after a command, flags checked, and `--flag` of a yes-or-no argument closed by its value."""
    plain = []
    for word in words:
        flag, equals, _ = word.partition('=')
        name = flag[2:].replace('-', '_')
        off = name.removeprefix('no')
        if flag.startswith('--') and off in operation.parameters and name not in operation.parameters:
            name, word, equals = off, f'--{off}=false', '='
        if flag.startswith('--'):
            refuse_unknown(operation, [name])
            word += '=true' if not equals and operation.parameters[name].annotation is bool else ''
        plain.append(word)
    return plain


def make(call: Call, config: Config, options: dict) -> str | None:
    """Makes a call that Fire noted, here or on a server, and renders its answer."""
    operation = call._operation
    given = {name: from_file(value, operation.parameters[name].annotation) for name, value in call._given.items()}
    bound = bind(operation, given, Here(config.zone, instant(int(time.time()))))
    if operation.name in LOCAL:
        return operation.method(config, **bound)
    service = Client(config.url, config.token) if config.url else local_service(config)
    form, asked = options.get('format', 'table'), getattr(service, operation.name)
    if options.get('follow'):
        follow(asked, bound, form, config.zone)
    return render(asked(**bound), form, config.zone, COLUMNS.get(operation.name))


def follow(events: Callable, bound: dict, form: str, zone: ZoneInfo, pause: float = 1) -> None:
    """Prints events as they come, a line each, until it is interrupted."""
    while True:
        for each in events(**bound):
            line = json_text(each) if form == 'json' else '  '.join(
                in_cell(each[name], zone) for name in ('at', 'actor', 'code', 'label', 'sentence')) + '\n'
            print(line, end='', flush=True)
            bound = bound | {'after': each['id']}
        time.sleep(pause)


def from_file(value: str, kind):
    """What a file argument stands for: the text of the file, or its reservations."""
    if kind not in (File, Rows) or not value:
        return value
    try:
        with open(value, encoding='utf-8-sig', newline='') as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, 'strerror', None) or 'it is not UTF-8'
        raise Invalid(f"can't read the file '{value}': {why}") from None
    return text if kind is File else file_rows(text, value)


def file_rows(text: str, name: str) -> list[dict]:
    """The reservations in a CSV, JSON or YAML text, each with the number of its line or place."""
    try:
        if name.endswith('.json'):
            return json.loads(text)
        if name.endswith(('.yaml', '.yml')):
            import yaml
            return yaml.load(text, yaml.BaseLoader)  # every value stays text: bind reads them
        return csv_rows(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise Invalid(f"'{name}' can't be read as {name.rpartition('.')[2].upper()}: {error}") from None
    except Exception as error:  # the YAML parser's own kinds, which are not worth importing it for
        raise Invalid(f"'{name}' is not YAML: {str(error).splitlines()[0]}") from None


def csv_rows(text: str) -> list[dict]:
    """The lines of a CSV text with commas, or with semicolons as spreadsheets of many countries write them."""
    head = text.partition('\n')[0]
    reader = csv.DictReader(io.StringIO(text), restkey='', skipinitialspace=True,
                            delimiter=';' if ';' in head and ',' not in head else ',')
    lines = [{**each, 'line': reader.line_num} for each in reader]
    for each in lines:
        if '' in each:
            raise ValueError(f"line {each['line']} has more cells than the first line has names")
    return lines


def progress_bar(items: list) -> Iterable:
    """The items, with a bar on a terminal while there are many."""
    if len(items) < 20 or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track
    return track(items, 'working', console=Console(stderr=True), transient=True)


def render(answer, form: str, zone: ZoneInfo, columns: str | None) -> str:
    """An answer as text: a table for people, or JSON, CSV or YAML for programs."""
    if form == 'json':
        return json.dumps(to_plain(answer), ensure_ascii=False, indent=2)
    if form == 'yaml':
        import yaml
        return yaml.safe_dump(to_plain(answer), allow_unicode=True, sort_keys=False).rstrip()
    if form == 'csv':
        return as_csv(answer if isinstance(answer, list) else [answer])
    return as_table(answer, zone, columns)


def as_csv(lines: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    for number, line in enumerate(to_plain(lines)):
        if number == 0:
            writer.writerow(line)
        writer.writerow([json.dumps(each, ensure_ascii=False) if isinstance(each, (list, dict)) else each
                         for each in line.values()])
    return out.getvalue().rstrip('\n')


def as_table(answer, zone: ZoneInfo, columns: str | None = None) -> str:
    if isinstance(answer, dict) and len(answer) == 1:
        return '\n'.join(map(str, answer.values()))
    if isinstance(answer, dict):
        inner = {name: each for name, each in answer.items() if each and isinstance(each, list)
                 and isinstance(each[0], dict)}
        pairs = [(name, in_cell(each, zone)) for name, each in answer.items()
                 if name not in inner and each not in (None, '', [], {})]
        tables = [f'\n{name}:\n{as_table(each, zone, COLUMNS.get(name, COLUMNS["list"]))}'
                  for name, each in inner.items()]
        return '\n'.join([drawn([], pairs) if pairs else '', *tables]).strip('\n')
    if not answer:
        return 'nothing found'
    names = [name for name in (columns.split() if columns else answer[0])
             if any(each.get(name) not in (None, '', [], {}) for each in answer)]
    names = names or list(answer[0])
    return drawn(names, [[in_cell(each.get(name), zone) for name in names] for each in answer])


def drawn(names: list[str], lines: list) -> str:
    """A table as text, as wide as the terminal, or as it needs to be where there is none."""
    from rich.console import Console
    from rich.table import Table as Drawing
    from rich.text import Text as Plain
    drawing = Drawing(*names, box=None, show_header=bool(names), pad_edge=False, header_style='bold')
    for line in lines:
        drawing.add_row(*map(Plain, line))
    console = Console(width=None if sys.stdout.isatty() else 250, file=io.StringIO(),
                      force_terminal=sys.stdout.isatty() or None)
    console.print(drawing)
    return '\n'.join(each.rstrip() for each in console.file.getvalue().splitlines())


def in_words(error: Error, zone: ZoneInfo) -> list[str]:
    """What a person reads of an error: its sentence, and of its details what helps to go on."""
    details, lines = error.details, [f'cmres: {error}']
    for each in details.get('in_the_way', []):
        who = f"{each['label']} of {each['user']}, " if 'label' in each else ''
        lines.append(f"  in the way: {who}{each['vms']} vms from {in_cell(each['start'], zone)} "
                     f"to {in_cell(each['end'], zone)}")
    offers = {'next_start': 'the same from {}', 'most_vms': '{} vms at that time', 'longest': '{} from that start'}
    lines += [f'  would fit:  {text.format(in_cell(details[name], zone))}'
              for name, text in offers.items() if name in details]
    lines += [f"  line {each['line']}: {each['label']}: {each['error']}" for each in details.get('refused', [])]
    lines += [f"  {each['label']} of {each['user']}, {each['vms']} vms from {in_cell(each['start'], zone)}"
              for each in details.get('occurrences', [])]
    return lines


if __name__ == '__main__':
    sys.exit(main())
