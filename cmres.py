#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "bottle~=0.13.4",          # REST: routes, requests, responses
#   "fire~=0.7.1",             # command line: commands and help out of functions
#   "openstacksdk>=4.4,<5",    # clouds: sessions, clouds.yaml, Nova, Glance, Neutron
#   "icalendar>=7.1,<8",       # calendars: what zones are called on Windows
#   "peewee~=4.5.3",           # store: models, transactions, one connection a thread
#   "pyyaml~=6.0",             # YAML files of reservations, YAML answers
#   "rich>=13,<16",            # progress bars for people
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
  state        waiting, pending, reserved, starting, active, degraded, ending, ended,
               cancelled or failed
  server       one virtual machine that a cloud made for an occurrence
  usage        how much of a resource is held at each instant: a step function of time
  event        one line of the journal: when, who, what, to which reservation, why

The file reads from top to bottom; a section uses only the sections above it:

  Errors, Time, Repetition            sentences, instants, wall times that come again and again
  Config, Metrics, Calls, Answers     settings; what is counted; what becomes arguments; answers
  Store, Capacity                     what is on disk; the rule that admits
  Clouds, Notices, Shares, Calendar   what boots VMs; who is told; who may be slow; iCalendar
  Service, Wishes, Limits             who asks; what is asked; how much anybody may have
  Holding, Series, Admission          one occurrence, many, whole reservations, by the rule
  Waiting, Requests, Plan             the waiting list; what people ask for; what operators do
  Claims, Calendars, Tokens, Records  what Nova asks; imports and feeds; who may ask; what was
  Life cycle                          what makes it so
  Document, REST, Gate, Page          the faces on the web, and what stands before them
  Serving, Client, Command line       sockets; Python elsewhere; the shell
  Nova filter                         what nova-scheduler loads from this file
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import getpass
import hashlib
import heapq
import inspect
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import signal
import socket
import sqlite3
import struct
import sys
import textwrap
import threading
import time
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import date, datetime, timedelta, timezone, tzinfo
from html import unescape
from types import UnionType
from typing import (Any, Callable, Iterable, Iterator, NamedTuple, NewType, NotRequired, Union,
                    get_args, get_origin, get_type_hints)
from urllib.parse import parse_qsl, quote, unquote, urlencode, urljoin, urlsplit
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
    """What could not be done and what would be right, in one sentence; `details` says more to
    programs.
    """
    status = 500

    def __init__(self, sentence: str, **details):
        super().__init__(sentence)
        self.details = details


class Invalid(Error): status = 400       # noqa: E701
class Unauthorized(Error): status = 401  # noqa: E701
class Forbidden(Error): status = 403     # noqa: E701
class NotFound(Error): status = 404      # noqa: E701
class Conflict(Error): status = 409      # noqa: E701
class Changed(Error): status = 412       # noqa: E701
class TooLarge(Error): status = 413      # noqa: E701
class TooMany(Error): status = 429       # noqa: E701
class BadCalendar(Error): status = 422   # noqa: E701
class KeyReused(Error): status = 422     # noqa: E701
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


class UnknownCloud(CloudError):
    """A cloud that clouds.yaml does not name."""
    status = 404


ERRORS = {kind.__name__: kind for kind in (
    Error, Invalid, Unauthorized, Forbidden, NotFound, Conflict, Changed, TooLarge, TooMany,
    BadCalendar, KeyReused, NoCapacity, Unavailable, CloudError, UnknownCloud)}


def nearest(word: str, words: Iterable[str]) -> str:
    """The hint to append to a sentence that refuses `word`: '' or '; did you mean ...?'."""
    found = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean '{found[0]}'?" if found else ''


#: Characters that control a terminal, turn the order of letters round, or can't be seen: C0 and C1
#: but tab and newline, bidi controls (Unicode, UAX #9), separators of lines, invisible operators
#: and tags, and halves of pairs.
UNSEEN = re.compile(
    '[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f'
    '\ufeff\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]')


def legible(text: str) -> str:
    """A text with its unseen characters as JSON writes them, such as \\u202e; JSON stays valid."""
    return UNSEEN.sub(lambda found: json.dumps(found[0])[1:-1], text)


def shown(value) -> str:
    """A value as a sentence quotes it: short, on one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return textwrap.shorten(legible(text), 60, placeholder='...')


def first_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200)


# Time ########################################################################
#
# Promised instants are whole seconds since 1970 in the store and aware datetimes in Python;
# measured ones keep their fraction. Text is read and written at the edges only.

UTC = timezone.utc
FIRST, LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
# a time and the zone of its clock (RFC 9557)
ZONED = re.compile(r'(.*)\[([A-Za-z0-9_+/-]{1,64})\]')
DURATION = re.compile(r'\+?' + ' *'.join(
    rf'(?:(\d{{1,10}}(?:\.\d{{1,3}})?) ?(?:{unit}))?' for unit in (
        'w|weeks?', 'd|days?', 'h|hrs?|hours?', 'm|mins?|minutes?', 's|secs?|seconds?')),
                      re.I | re.A)
CLOCK_LENGTH = re.compile(r'\+?(\d{1,4}):([0-5]\d)')
ISO_DURATION = re.compile(
    r'P(?:(\d{1,4})W)?(?:(\d{1,5})D)?(?:T(?:(\d{1,6})H)?(?:(\d{1,8})M)?(?:(\d{1,10})S)?)?',
    re.I | re.A)
# An offset's + that an unescaped query made a space.
LOST_PLUS = re.compile(r'(:\d\d) (\d\d:?\d\d)$')
CLOCK = re.compile(r'(\d{1,2})(?::(\d\d)(?::(\d\d))?)?([ap]m)?', re.A)
DAY_NAMES = ('monday', 'tuesday', 'wednesday', 'thursday', 'friday', 'saturday', 'sunday')
MONTH_NAMES = ('january', 'february', 'march', 'april', 'may', 'june', 'july', 'august',
               'september', 'october', 'november', 'december')
#: Days from today; what else names a date, `dates_of` reads.
NEAR_DAYS = {'yesterday': -1, 'today': 0, 'tomorrow': 1}

class Typed(datetime):
    """An instant that was typed as a time on the clocks of a zone; `wall` and `zone` are that.

    It differs from what those clocks show at the instant where the time doesn't exist there.
    """
    wall: datetime | None = None  # of a result of arithmetic: not known
    zone: ZoneInfo | None = None


class Length(timedelta):
    """A length that was typed: days are `nominal`, hours and less exact (RFC 5545, 3.3.6)."""
    nominal: int = 0  # seconds of its whole days


def instant(seconds: float | None) -> datetime | None:
    """The aware UTC datetime of seconds since 1970."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def zone_table() -> str:
    """Which releases of the zone table are here: that of the system, and that of the package
    tzdata.
    """
    from importlib.metadata import version
    try:
        with open('/usr/share/zoneinfo/tzdata.zi', encoding='ascii') as file:
            return f"{file.readline().strip('# ').strip()} {version('tzdata')}"
    except OSError:
        return version('tzdata')


def read_zone(name: str) -> ZoneInfo:
    """The time zone of a name.

    Raises:
      Invalid: there is none of that name.
    """
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):
        raise Invalid(f"unknown time zone '{name}'; write one such as Europe/Paris or "
                      'UTC') from None


def machine_zone(environ: dict, link: str = '/etc/localtime') -> str:
    """The name of the zone that the clocks of this machine show: by TZ, else by what `link` points
    to.
    """
    where = environ.get('TZ') or (os.path.realpath(link) if os.path.islink(link) else '')
    name = where.removeprefix(':').rpartition('/zoneinfo/')[2]
    return (name if known_zone(name) and not re.fullmatch('(Etc/)?(UTC|UCT|Zulu|Universal)', name)
            else 'UTC')


def parse_time(text: str, zone: ZoneInfo, now: datetime, after: datetime | None = None) -> datetime:
    """The instant that a person typed, in UTC and whole seconds.

    Args:
      text: ISO 8601 with or without offset, with `/` for `-` or a space for `T`; what a clock, a
        weekday or a date says, such as 9:00, 9am, mon 9:00, next tue 14:00, tomorrow 9:00 and
        1 Dec 2026, 9:00; `now`; `in 2h` or `+2h`, from now; all that `format_time` and
        `format_moment` make. A zone that stands behind it goes before `zone`.
      zone: the zone of a time without an offset
      after: what says no date, or no year, is the first such after this; without it, after now

    Returns:
      a Typed one where the text was a time without an offset.

    Raises:
      ValueError: it is none of these, may be two, or is outside the years 1970 to 2199.
    """
    word = LOST_PLUS.sub(r'\1+\2', text.strip())
    if word == 'now':
        return now
    if word.startswith('+') or word.startswith('in '):
        return now + parse_duration(word.removeprefix('in').strip())
    try:
        moment = iso_time(word, zone) or spoken_time(word, zone, after or now, now)
    except OverflowError:
        moment = None
    if not moment:
        raise ValueError(f"'{text}' is not a time; write 2026-12-01 09:00, 17:00, tomorrow 9:00, "
                         'mon 9:00, now or +2h')
    if not FIRST <= moment < LAST:
        raise ValueError(f"'{text}' is not between the years 1970 and 2199")
    return moment


def iso_time(word: str, zone: ZoneInfo) -> datetime | None:
    """The instant of a time in ISO 8601, maybe with a zone in brackets (RFC 9557); None if it is
    none.
    """
    if named := ZONED.fullmatch(word):
        word, zone = named[1], ZoneInfo(named[2]) if known_zone(named[2]) else None
    # Python takes any letter between date and time.
    if not zone or not re.fullmatch('[0-9:TWZ+ .,/-]+', word):
        return None
    try:
        wall = datetime.fromisoformat(word.replace('/', '-')).replace(microsecond=0)
    except ValueError:
        return None
    return wall.astimezone(UTC) if wall.tzinfo else at_clock(wall, zone)


def spoken_time(text: str, zone: ZoneInfo, after: datetime, now: datetime) -> datetime | None:
    """The instant that words name: a date and what a clock shows, or one of both; None if it is
    none.
    """
    words, zone, called = zone_of_words(text, zone)
    clocks = [word for word in words if read_clock(word) is not None]
    day = ' '.join(word for word in words if word not in clocks)
    if not zone or not words or len(clocks) > 1:
        return None
    clock = read_clock(clocks[0]) if clocks else timedelta(0)
    today = (now if day in NEAR_DAYS else after).astimezone(zone).date()
    walls = [datetime.combine(each, datetime.min.time()) + clock for each in dates_of(day, today)]
    moments = [at_clock(wall, zone, called) for wall in walls]
    return next((each for each in moments if each > after), moments[-1] if moments else None)


#: A time, what clocks call theirs, and the zone that they are in, as `format_moment` writes them.
WITH_ZONE = re.compile(r'(.*\d.*?)(?: ([A-Z]{1,5}|[+-]\d{2,4}))?'
                       r'(?: \(?([A-Za-z]\w+/[\w/+-]+|UTC)\)?)?')


def zone_of_words(text: str, zone: ZoneInfo) -> tuple[list[str], ZoneInfo | None, str]:
    """The words of a time, its zone (None if unknown), and what clocks call their time then."""
    match = WITH_ZONE.fullmatch(' '.join(text.split()))
    words, called, name = match.groups() if match else (text, None, None)
    if called and is_word(called.lower()):
        words, called = f'{words} {called}', None
    if name or called in ('UTC', 'GMT', 'Z'):
        name, called = name or 'UTC', None if not name else called
        zone = ZoneInfo(name) if known_zone(name) else None
    words = re.sub(r'(\d{4}-\d\d-\d\d)t', r'\1 ', words.lower().replace(',', ' '))
    words = re.sub(r'(\d) ([ap]m)\b', r'\1\2', words)
    words = re.sub(r'\bat (\d{1,2})(?= |$)', r'\1:00', words)
    return [word for word in words.split() if word not in ('at', 'on')], zone, called or ''


def is_word(text: str) -> bool:
    """Whether it is a word of a time, and no zone: pm, tue, december."""
    return text in ('am', 'pm', 'noon') or any(
        len(text) > 1 and name.startswith(text) for name in DAY_NAMES + MONTH_NAMES)


def known_zone(name: str) -> bool:
    try:
        return bool(read_zone(name))
    except Invalid:
        return False


def read_clock(word: str) -> timedelta | None:
    """The time of day that a word names, from midnight on: 9:00, 9am, 12:30pm, noon, 24:00."""
    if word in ('noon', 'midnight'):
        return timedelta(hours=12 if word == 'noon' else 24)
    match = CLOCK.fullmatch(word)
    if not match or not (match[2] or match[4]):
        return None
    hour, minute, second = (int(part or 0) for part in match.groups()[:3])
    if match[4]:
        hour = hour % 12 + 12 * (match[4] == 'pm') if 1 <= hour <= 12 else 99
    clock = timedelta(hours=hour, minutes=minute, seconds=second)
    return clock if minute < 60 and second < 60 and clock <= timedelta(days=1) else None


def dates_of(words: str, today: date) -> list[date]:
    """The dates that words may mean, the nearest first; those without a year come again.

    Raises:
      ValueError: they name two days, such as 01/02/2026.
    """
    if not words:
        return [today, today + timedelta(days=1), today + timedelta(days=2)]
    if words in NEAR_DAYS:
        return [today + timedelta(days=NEAR_DAYS[words])]
    if match := re.fullmatch(r'(next |this )?([a-z]{2,})', words):
        return coming_weekdays(match[2], today, match[1] == 'next ')
    if match := re.fullmatch(r'(\d{4})-(\d\d)-(\d\d)t?', words):
        return dates_on(match[3], match[2], match[1])
    if match := re.fullmatch(r'(\d{1,2})([./])(\d{1,2})\2(\d{4})', words):
        return slashed_date(*match.groups())
    return named_dates(words, today)


def coming_weekdays(word: str, today: date, later: bool) -> list[date]:
    days = [number for number, name in enumerate(DAY_NAMES) if name.startswith(word)]
    if len(days) != 1:
        return []
    first = today + timedelta(days=(days[0] - today.weekday()) % 7)
    dates = [first, first + timedelta(days=7)]
    return [max(each for each in dates[:1 + (first == today)])] if later else dates


def slashed_date(first: str, mark: str, second: str, year: str) -> list[date]:
    """A date in figures: the day comes first where dots are; where slashes are, people differ."""
    there = dates_on(first, second, year)
    other = dates_on(second, first, year) if mark == '/' else []
    if there and other and there != other:
        one, two = (f'{each[0]:%d %b %Y}'.lstrip('0') for each in (there, other))
        raise ValueError(f"'{first}/{second}/{year}' may be {one} or {two}; write "
                         f'{there[0]} or {other[0]}')
    return there or other


def dates_on(day: str, month: str | int, year: str | int) -> list[date]:
    try:
        return [date(int(year), int(month), int(day))]
    except ValueError:
        return []


def named_dates(words: str, today: date) -> list[date]:
    """The dates of: 1 dec, dec 1st 2026, tue 1 december 2026."""
    match = re.fullmatch(r'(?:([a-z]{2,}) )?(?:(\d{1,2})(?:st|nd|rd|th)?\.? ([a-z]{3,})|'
                         r'([a-z]{3,})\.? (\d{1,2})(?:st|nd|rd|th)?)(?: (\d{4}))?', words)
    if not match:
        return []
    weekday, day, month, other_month, other_day, year = match.groups()
    months = [number for number, name in enumerate(MONTH_NAMES, 1)
              if name.startswith(month or other_month)]
    if len(months) != 1:
        return []
    years = [year] if year else range(today.year, today.year + 9)
    dates = [found for each in years for found in dates_on(day or other_day, months[0], each)]
    dates = [each for each in dates if year or each >= today]
    if not weekday or not dates:
        return dates
    fitting = [each for each in dates if DAY_NAMES[each.weekday()].startswith(weekday)]
    if not fitting or len(dates) > 1 and fitting[0] != dates[0]:
        is_one = DAY_NAMES[dates[0].weekday()].capitalize()
        raise ValueError(f"{dates[0].day} {dates[0]:%b %Y} is a {is_one}, not '{weekday}'")
    return fitting


def at_clock(wall: datetime, zone: ZoneInfo, called: str = '') -> datetime:
    """The instant at which clocks of a zone show a time.

    Args:
      called: what they call their time then, such as CET or +03; it tells apart an hour that
        comes twice

    Raises:
      ValueError: they call it otherwise.
    """
    folds = [wall.replace(tzinfo=zone, fold=fold) for fold in (0, 1)]
    if not called:
        return typed_at(folds[0].astimezone(UTC), wall, zone)
    for each in folds:
        if each.tzname() == called:
            return each.astimezone(UTC)
    raise ValueError(f"clocks of {zone.key} do not show {called} at {wall:%Y-%m-%d %H:%M}; write "
                     f'the zone: {wall:%Y-%m-%d %H:%M} ({zone.key})')


def typed_at(moment: datetime, wall: datetime, zone: ZoneInfo) -> Typed:
    """An instant with the time that was typed for it."""
    typed = Typed.fromtimestamp(moment.timestamp(), UTC)
    typed.wall, typed.zone = wall, zone
    return typed


def parse_duration(text: str) -> Length:
    """The length that a person typed; ValueError if it is none.

    Args:
      text: 2h, +1d12h, 90min, 1.5h, 2 hours 30 minutes, 1:30, or PT2H
    """
    word = text.strip()
    match = DURATION.fullmatch(word) or ISO_DURATION.fullmatch(word)
    clock = CLOCK_LENGTH.fullmatch(word)
    if not clock and not (match and any(match.groups())):
        raise ValueError(f"'{text}' is not a duration; write 2h, 1d12h, 90m, 1.5h or PT2H")
    parts = (0, 0, *clock.groups(), 0) if clock else match.groups()
    weeks, days, hours, minutes, seconds = (float(part or 0) for part in parts)
    days += 7 * weeks
    seconds += 86400 * days + 3600 * hours + 60 * minutes
    if seconds > (LAST - FIRST).total_seconds():
        raise ValueError(f"'{text}' is longer than {(LAST - FIRST).days} days")
    length = Length(seconds=round(seconds))
    length.nominal = 86400 * int(days)
    return length


def format_time(moment: datetime, zone: ZoneInfo) -> str:
    """A time for people: 2026-12-01 09:00 CET; seconds only where they are not zero."""
    local = moment.astimezone(zone)
    clock = '%H:%M:%S' if local.second else '%H:%M'
    return local.strftime(f'%Y-%m-%d {clock} %Z')


def format_moment(moment: datetime, zone: ZoneInfo) -> str:
    """A time for people who may be elsewhere: Tue 1 Dec 2026, 09:00 (Europe/Paris)."""
    local = moment.astimezone(zone)
    clock = '%H:%M:%S' if local.second else '%H:%M'
    twice = local.replace(fold=1 - local.fold).astimezone(UTC) != moment.astimezone(UTC)
    called = ' %Z' if twice else ''
    return local.strftime(f'%a {local.day} %b %Y, {clock}{called} ({zone.key})')


def format_duration(length: float) -> str:
    """Seconds for people: 1d2h30m; parse_duration reads it back."""
    parts = []
    for unit, seconds in (('d', 86400), ('h', 3600), ('m', 60), ('s', 1)):
        parts.append((int(length // seconds), unit))
        length %= seconds
    return ''.join(f'{number}{unit}' for number, unit in parts if number) or '0s'


# Repetition ##################################################################
#
# A series is kept as a person thinks of it: wall times in a zone, a rule of RFC 5545, and what is
# left out. Only the last step makes instants of that, with the zone table as it is then, so that a
# class at 9:00 stays at 9:00 when clocks change, and also when a government changes its mind.
#
#   An hour that doesn't exist is taken with the offset before the gap: 02:30 becomes 03:30.
#   An hour that exists twice is taken the first time (both RFC 5545, 3.3.5).
#   An end that was typed as a time is a wall time as well: a night from 22:00 to 06:00 ends at
#   06:00 on every date. A length is a length on every date: six hours are six, a day is to the same
#   hour of the next day (RFC 5545, 3.3.6).

MOST_OCCURRENCES = 2000  # of a series within the horizon
MOST_A_DAY = 100
MOST_RULE = 4000  # letters
#: What may stand in a rule, and between which numbers (RFC 5545, 3.3.10).
RULE_PARTS = {'FREQ': None, 'UNTIL': None, 'WKST': None, 'BYDAY': None, 'COUNT': (1, 100_000),
              'INTERVAL': (1, 1000),
              'BYMONTH': (1, 12), 'BYMONTHDAY': (1, 31), 'BYYEARDAY': (1, 366), 'BYWEEKNO': (1, 53),
              'BYSETPOS': (1, 366), 'BYHOUR': (0, 23), 'BYMINUTE': (0, 59), 'BYSECOND': (0, 59)}
CLOCK_PARTS = ('BYHOUR', 'BYMINUTE', 'BYSECOND')
FREQUENCIES = {'day': 'DAILY', 'week': 'WEEKLY', 'month': 'MONTHLY', 'year': 'YEARLY'}
WEEKDAYS = ('MO', 'TU', 'WE', 'TH', 'FR', 'SA', 'SU')
#: Days that these leave of a week, or of some days, differ from one to the next.
UNEVEN = {'BYMONTH', 'BYMONTHDAY', 'BYYEARDAY', 'BYWEEKNO', 'BYSETPOS'}
ORDINALS = {'first': '1', 'second': '2', 'third': '3', 'fourth': '4', 'fifth': '5', 'last': '-1'}
REPEAT_HELP = ('write daily, weekdays, weekly on tue,thu, every 2 weeks on mon, every other tue, '
               'monthly on first mon, or an RRULE')


class Stretch(NamedTuple):
    """A stretch of a series; wall times as ISO text, lengths in seconds of wall time, but `exact`.

    A slot is the wall time at which the rule puts an occurrence: its key, wherever it is moved to.
    """
    start: str
    length: int
    zone: str
    vms: int
    resource: int      # id
    rule: str = ''     # RRULE
    dates: tuple = ()  # RDATE: further slots; with /SECONDS, of another length
    skips: tuple = ()  # EXDATE: slots, or days, without an occurrence
    since: str = ''    # slots from then on ...
    until: str = ''    # ... to before then belong to this stretch
    shift: int = 0     # how much later than its slot each occurrence starts
    moved: dict = {}   # slot: (wall time, length, vms, exact) of those that are otherwise
    # elapsed seconds from the end of `length` on: what clocks show of them may differ
    exact: int = 0

    @property
    def single(self) -> bool:
        return not self.rule and not self.dates


class Slot(NamedTuple):
    """An occurrence that a series wants: its key ('' if it is the only one), and seconds since
    1970.
    """
    key: str
    start: int
    end: int
    vms: int
    resource: int


def to_wall(moment: datetime, zone: ZoneInfo) -> datetime:
    """What clocks in a zone show at an instant."""
    return moment.astimezone(zone).replace(tzinfo=None, fold=0)


def typed_wall(moment: datetime, zone: ZoneInfo) -> datetime:
    """The wall time that was typed for an instant in a zone, else what clocks show there."""
    typed = getattr(moment, 'wall', None)
    return typed if typed and moment.zone.key == zone.key else to_wall(moment, zone)


def typed_length(end: datetime | timedelta, start: datetime, first: datetime,
                 zone: ZoneInfo) -> tuple[int, int]:
    """The length of a stretch that an end asks for: seconds by the clocks, and exact ones after
    that.

    Args:
      end: a length keeps its hours; a time is one on the clocks
      start, first: the instant and the wall time that it counts from
    """
    if not isinstance(end, timedelta):
        by_clocks = int((typed_wall(end, zone) - first).total_seconds())
        return (by_clocks, 0) if by_clocks > 0 else (0, int((end - start).total_seconds()))
    nominal = getattr(end, 'nominal', 0)
    return nominal, int(end.total_seconds()) - nominal


def from_wall(wall: datetime, zone: ZoneInfo) -> datetime:
    """The instant of a wall time, also of one that doesn't exist or exists twice."""
    return wall.replace(tzinfo=zone).astimezone(UTC)


def at_midnight(day: date) -> datetime:
    """The wall time at which a day begins."""
    return datetime(day.year, day.month, day.day)


def read_repeat(text: str, here=None) -> str:
    """The RRULE that a person typed or meant; its UNTIL, if any, is left as it is.

    Raises:
      ValueError: it is none, or one that is not for machines, such as FREQ=SECONDLY.
    """
    word = ' '.join(text.split()).removeprefix('RRULE:')
    return checked_rule(word.upper() if '=' in word else spoken_rule(word.lower())) if word else ''


#: What people say for what `spoken_rule` reads.
SAME_RULES = {'weekdays': 'weekly on mon,tue,wed,thu,fri', 'biweekly': 'every 2 weeks',
              'fortnightly': 'every 2 weeks', 'every weekday': 'weekly on mon,tue,wed,thu,fri'}
SPOKEN = re.compile(
    r'(?:(?P<name>daily|weekly|monthly|yearly)|'
    r'every(?: (?P<number>\d+))? (?P<unit>day|week|month|year)s?)'
    r'(?: on (?P<on>.+))?|every(?P<other> other)? (?P<days>.+)')
SPOKEN_DAY = re.compile(r'(?:the )?(?:(first|second|third|fourth|fifth|last) )?([a-z]{2,})'
                        '(?: of the month)?')
SPOKEN_END = re.compile(r'(.+?),? (?:until (?:the )?(.+)|(?:for )?(\d+) times)')


def spoken_rule(words: str) -> str:
    """The RRULE of: daily, every tue and thu, every other week, monthly on last fri, weekly until
    23 feb 2027.
    """
    text, ends = words, ''
    if match := SPOKEN_END.fullmatch(words):
        text = match[1]
        ends = f';COUNT={match[3]}' if match[3] else f';UNTIL={last_day(match[2], words)}'
    text = SAME_RULES.get(text, text)
    text = re.sub('^every other (day|week|month|year)$', r'every 2 \1s', text)
    text = re.sub('^every other (day|week|month|year)( on .+)$', r'every 2 \1s\2', text)
    match = SPOKEN.fullmatch(text)
    if not match:
        raise ValueError(f"'{words}' is no repetition; {REPEAT_HELP}")
    if match['days']:
        return every_named_day(match['days'], '2' if match['other'] else '', words) + ends
    rule = f"FREQ={match['name'].upper() if match['name'] else FREQUENCIES[match['unit']]}"
    rule += f";INTERVAL={match['number']}" if match['number'] else ''
    return rule + (spoken_days(match['on'], words) if match['on'] else '') + ends


def every_named_day(text: str, interval: str, words: str) -> str:
    """The RRULE of `every` with names of days behind it, which are days of a week or of a month."""
    days = spoken_days(text, words)
    monthly = re.search('=.*[0-9]', days)
    if 'BYMONTHDAY' in days:  # `every 15` says neither month nor day
        raise ValueError(f"'{words}' is no repetition; {REPEAT_HELP}")
    rule = 'FREQ=MONTHLY' if monthly else 'FREQ=WEEKLY'
    return rule + (f';INTERVAL={interval}' if interval else '') + days


def last_day(text: str, words: str) -> str:
    """The last date of a repetition as UNTIL has it, of words that name one with its year."""
    days = dates_of(' '.join(text.replace(',', ' ').split()), date.min)
    if len(days) != 1:
        raise ValueError(f"'{words}' names no last date; write it with its year, such as "
                         'until 23 feb 2027')
    return f'{days[0]:%Y%m%d}T235959'


def spoken_days(text: str, words: str) -> str:
    days = [day.strip().removeprefix('the ') for day in re.split(',| and ', text)]
    days = [re.sub(r'^(\d{1,2})(st|nd|rd|th)$', r'\1', '-1' if day == 'last day' else day)
            for day in days]
    if all(re.fullmatch(r'-?\d{1,2}', day) for day in days):
        return f";BYMONTHDAY={','.join(days)}"
    found = [SPOKEN_DAY.fullmatch(day) for day in days]
    if not all(each and is_weekday(each[2]) for each in found):
        raise ValueError(f"'{words}' is no repetition; {REPEAT_HELP}")
    return ';BYDAY=' + ','.join(ORDINALS.get(each[1], '') + each[2][:2].upper() for each in found)


def is_weekday(word: str) -> bool:
    return any(name.startswith(word) or f'{name}s' == word for name in DAY_NAMES)


def rule_in_words(rule: str) -> str:
    """A repetition for people, which `read_repeat` reads back; the rule itself where words can't
    say it.
    """
    parts = dict(part.split('=') for part in rule.split(';'))
    unit = next(unit for unit, name in FREQUENCIES.items() if name == parts['FREQ'])
    number = int(parts.get('INTERVAL', 1))
    every = f'every {number} {unit}s' if number > 1 else f'every {unit}'
    days = days_in_words(parts)
    said = {'FREQ', 'INTERVAL', 'BYDAY', 'BYMONTHDAY', 'UNTIL', 'COUNT', 'WKST'}
    if parts.keys() - said or days is None or 'BYDAY' in parts and 'BYMONTHDAY' in parts:
        return rule
    if number == 1 and unit == 'week' and days:
        every, days = ('every', days if days != 'Monday, Tuesday, Wednesday, Thursday and Friday'
                       else 'weekday')
    elif days:
        days = f'on {days}'
    ends = f"{parts['COUNT']} times" if 'COUNT' in parts else ''
    if 'UNTIL' in parts:
        last = read_until(parts['UNTIL'])
        ends = f'until {last.day} {last:%b %Y}'
    return ' '.join(filter(None, (every, days, ends)))


def days_in_words(parts: dict) -> str | None:
    """Days of a rule as people say them; '' without any, None where words can't say them."""
    names = {short: name.capitalize() for short, name in zip(WEEKDAYS, DAY_NAMES)}
    ordinals = {number: f'the {word} ' for word, number in ORDINALS.items()} | {'': ''}
    days = []
    for day in filter(None, parts.get('BYDAY', '').split(',')):
        number, name = day[:-2].removeprefix('+'), day[-2:]
        if number not in ordinals or number and parts['FREQ'] != 'MONTHLY':
            return None
        days.append(ordinals[number] + names[name])
    for day in filter(None, parts.get('BYMONTHDAY', '').split(',')):
        if int(day) < -1 or parts['FREQ'] != 'MONTHLY':
            return None
        days.append('the last day' if day == '-1' else f'the {nth(int(day))}')
    return ' and '.join(filter(None, (', '.join(days[:-1]), *days[-1:])))


def nth(number: int) -> str:
    ending = 'th' if number in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')
    return f'{number}{ending}'


def checked_rule(rule: str) -> str:
    """A rule in capitals, its parts allowed and within bounds; ValueError if not."""
    if len(rule) > MOST_RULE:
        raise ValueError(f'a repetition has at most {MOST_RULE} letters')
    pairs = [part.partition('=')[::2] for part in rule.strip(';').split(';')]
    parts = dict(pairs)
    for name, value in pairs:
        if name not in RULE_PARTS or [each for each, _ in pairs].count(name) > 1:
            raise ValueError(f'{shown(name)} is no part of a repetition, or is there twice')
        if RULE_PARTS[name]:
            check_numbers(name, value, *RULE_PARTS[name])
    if math.prod(parts.get(name, '').count(',') + 1 for name in CLOCK_PARTS) > MOST_A_DAY:
        raise ValueError(f'it is more than {MOST_A_DAY} times a day')
    if parts.get('FREQ') not in FREQUENCIES.values():
        raise ValueError(f"FREQ={parts.get('FREQ', '')} is none of "
                         f"{', '.join(FREQUENCIES.values())}")
    if not all(re.fullmatch(r'([+-]?([1-9]|[1-4]\d|5[0-3]))?(MO|TU|WE|TH|FR|SA|SU)', day)
               for day in parts.get('BYDAY', 'MO').split(',')) or parts.get('WKST',
                                                                            'MO') not in WEEKDAYS:
        raise ValueError(f'{rule}: a day is MO, TU, WE, TH, FR, SA or SU, in BYDAY also 1MO or '
                         f'-1FR')
    if 'UNTIL' in parts and ('COUNT' in parts or not read_until(parts['UNTIL'])):
        raise ValueError(f'{rule}: UNTIL is such as 20261231T235959Z, and not beside a COUNT')
    return ';'.join(f'{name}={value}' for name, value in pairs)


def read_until(text: str) -> datetime | None:
    """The last instant of a rule as it stands there, a day to its end; None if it is none."""
    whole = text if 'T' in text else f'{text}T235959'
    try:
        return (datetime.strptime(whole.removesuffix('Z'), '%Y%m%dT%H%M%S')
                if len(whole) in (15, 16) else None)
    except ValueError:
        return None


def check_numbers(name: str, text: str, least: int, most: int) -> None:
    signed = name in ('BYMONTHDAY', 'BYYEARDAY', 'BYWEEKNO', 'BYSETPOS')
    numbers = text.split(',') if name.startswith('BY') else [text]
    for number in numbers:
        if not re.fullmatch('[+-]?[0-9]{1,6}' if signed else '[0-9]{1,6}', number) or not (
                least <= abs(int(number)) <= most):
            raise ValueError(f'{name}={shown(text)[1:-1]} is not between {least} and {most}')


def local_rule(rule: str, zone: ZoneInfo) -> str:
    """A rule whose UNTIL is a wall time, as its slots are; a day is meant to its end."""
    def localised(match):
        last = read_until(match[1])
        last = to_wall(last.replace(tzinfo=UTC), zone) if match[1].endswith('Z') else last
        return f'UNTIL={min(last, LAST.replace(tzinfo=None)):%Y%m%dT%H%M%S}'
    return re.sub(r'UNTIL=([0-9TZ]+)', localised, rule)


def parts_of(rule: str) -> dict[str, str]:
    return dict(part.split('=') for part in rule.split(';'))


def explicit(rule: str, start: datetime) -> str:
    """A rule that names its days, where it left that to its start (RFC 5545, 3.3.10)."""
    parts = parts_of(rule)
    if parts['FREQ'] == 'DAILY' or {'BYDAY', 'BYMONTHDAY', 'BYYEARDAY'} & set(parts):
        return rule
    if parts['FREQ'] == 'WEEKLY' or 'BYWEEKNO' in parts:
        return f'{rule};BYDAY={WEEKDAYS[start.weekday()]}'
    month = '' if parts['FREQ'] == 'MONTHLY' or 'BYMONTH' in parts else f';BYMONTH={start.month}'
    return f'{rule}{month};BYMONTHDAY={start.day}'


class By(NamedTuple):
    """What the BY parts of a rule leave of a year; of an empty one all is left."""
    months: tuple = ()
    monthdays: tuple = ()
    yeardays: tuple = ()
    weeks: tuple = ()
    weekdays: tuple = ()
    ordinals: tuple = ()   # weekdays with their number in a month or year
    monthly: bool = False  # that number is of a month
    first: int = 0         # the weekday on which weeks begin


class Rule(NamedTuple):
    """An RRULE as numbers."""
    unit: str        # of its turns: FREQ
    interval: int
    count: int       # 0 without one
    last: datetime
    by: By
    positions: tuple
    times: tuple     # of a day, since midnight


@functools.lru_cache(2000)
def read_rule(rule: str, start: datetime) -> Rule:
    """A checked rule as numbers; what it leaves to its start is that of its start."""
    parts = parts_of(explicit(rule, start))
    months, monthdays, yeardays, weeks, positions = (
        numbers_in(parts, f'BY{name}')
        for name in ('MONTH', 'MONTHDAY', 'YEARDAY', 'WEEKNO', 'SETPOS'))
    days = [(int(day[:-2] or 0), WEEKDAYS.index(day[-2:]))
            for day in parts.get('BYDAY', '').split(',') if day]
    unit = parts['FREQ']
    numbered = unit in ('MONTHLY', 'YEARLY')
    by = By(months, monthdays, yeardays, weeks,
            tuple(sorted({day for number, day in days if not (number and numbered)})),
            tuple(sorted({day for day in days if day[0] and numbered})),
            unit == 'MONTHLY' or bool(months), WEEKDAYS.index(parts.get('WKST', 'MO')))
    clock = (numbers_in(parts, name) or (now,) for name, now in
             zip(CLOCK_PARTS, (start.hour, start.minute, start.second)))
    times = tuple(timedelta(hours=hour, minutes=minute, seconds=second)
                  for hour, minute, second in itertools.product(*clock))
    last = read_until(parts['UNTIL']) if 'UNTIL' in parts else datetime.max
    return Rule(unit, int(parts.get('INTERVAL', 1)), int(parts.get('COUNT', 0)), last, by,
                positions, times)


def numbers_in(parts: dict, name: str) -> tuple[int, ...]:
    return tuple(sorted({int(each) for each in parts[name].split(',')})) if name in parts else ()


#: The days of a year, or of a leap year, before each of its months, and all.
MONTHS = tuple((*itertools.accumulate((31, 28 + leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31),
                                      initial=0),) for leap in (0, 1))


@functools.lru_cache(4000)
def days_left(by: By, weekday: int, leap: bool, after_leap: bool) -> tuple[int, ...]:
    """The days, counted from 0, that BY parts leave of a kind of year: there are 28 kinds.

    Args:
      weekday: of its first day
    """
    starts, length = MONTHS[leap], 365 + leap
    days = set(range(length))
    months = [range(*starts[number - 1:number + 1]) for number in by.months or range(1, 13)]
    if by.months:
        days.intersection_update(itertools.chain(*months))
    if by.monthdays:
        days &= numbered_of(by.monthdays, [range(*each) for each in itertools.pairwise(starts)])
    if by.yeardays:
        days &= numbered_of(by.yeardays, [range(length)])
    if by.weeks:
        days &= days_of_weeks(by, weekday, length, 365 + after_leap)
    if by.weekdays:
        days.intersection_update(*[itertools.chain(*(range((day - weekday) % 7, length, 7)
                                                     for day in by.weekdays))])
    if by.ordinals:
        spans = months if by.monthly else [range(length)]
        days &= set().union(*(numbered_of([number], [
            range(span.start + (day - weekday - span.start) % 7, span.stop, 7) for span in spans])
            for number, day in by.ordinals))
    return tuple(sorted(days))


def numbered_of(numbers: Iterable[int], spans: list[range]) -> set[int]:
    """Of each span the days with these numbers; those below 0 count from its end."""
    return {span[number - (number > 0)] for span in spans for number in numbers
            if abs(number) <= len(span)}


def days_of_weeks(by: By, weekday: int, length: int, before: int) -> set[int]:
    """The days of a year in weeks with some numbers (ISO 8601, but weeks begin as a rule says)."""
    first = first_week(weekday - by.first)
    after = length + first_week(weekday + length - by.first)
    last_year = first_week(weekday - before - by.first) - before
    weeks = [range(start, start + 7) for start in range(first, after, 7)]
    days = {day for number in by.weeks if abs(number) <= len(weeks)
            for day in weeks[number - (number > 0)]}
    if 1 in by.weeks:
        days.update(range(after, length))
    if {-1, (first - last_year) // 7} & {*by.weeks}:
        days.update(range(first))
    return days


def first_week(weekday: int) -> int:
    """The day on which the first week of a year begins: that with four days of it."""
    return 3 - (weekday % 7 + 3) % 7


class Steps(threading.local):
    """How much this thread has had to look at: a clock that runs alike on all machines."""
    taken, most = 0, math.inf

    def take(self, number: int) -> None:
        """Counts some steps of about a microsecond; Invalid where they are too many."""
        self.taken += number
        if self.taken > self.most:
            raise Invalid('when it occurs is too hard to follow; write a simpler rule, or fewer '
                          'dates and exceptions')

    @contextmanager
    def at_most(self, number: float) -> Iterator[None]:
        """Bounds what is done within."""
        before, self.most = self.most, self.taken + number
        try:
            yield
        finally:
            self.most = before


STEPS = Steps()


def turn_of(rule: Rule, start: date) -> Callable[[int], int]:
    """Which turn of a rule a day is in, counted from that of its start."""
    first = start.toordinal()
    if rule.unit == 'DAILY':
        return lambda day: day - first
    if rule.unit == 'WEEKLY':
        first -= (start.weekday() - rule.by.first) % 7
        return lambda day: (day - first) // 7
    of_year = rule.unit == 'YEARLY'

    def turn(day: int) -> int:
        there = date.fromordinal(day)
        years = there.year - start.year
        return years if of_year else 12 * years + there.month - start.month
    return turn


def rule_days(rule: Rule, start: date, begin: date) -> Iterator[list[int]]:
    """The days of a rule from one on, as ordinals: year by year, with positions turn by turn."""
    turn = turn_of(rule, start)
    first = begin.toordinal()
    if rule.positions:  # of a turn all days count, but those of weeks only from the start on
        now = turn(first)
        while first > 1 and turn(first - 1) == now and (
                rule.unit in ('MONTHLY', 'YEARLY') or first > start.toordinal()):
            first -= 1
    years = years_of_days(rule, turn, first)
    if not rule.positions:
        return years
    return (list(days) for _, days in itertools.groupby(itertools.chain.from_iterable(years), turn))


def years_of_days(rule: Rule, turn: Callable[[int], int], first: int) -> Iterator[list[int]]:
    """The days of a rule from one on, year by year, as far as times go."""
    for year in range(date.fromordinal(first).year, min(rule.last.year, LAST.year) + 1):
        start = date(year, 1, 1)
        before = start.toordinal()
        kinds = start.weekday(), is_leap(year), is_leap(year - 1)
        STEPS.take(10)
        if rule.unit == 'YEARLY' and turn(before) % rule.interval:
            continue
        days = [before + day for day in days_left(rule.by, *kinds)]
        STEPS.take(len(days) // (2 if rule.positions or rule.interval > 1 else 8))
        if rule.interval > 1:
            days = [day for day in days if turn(day) % rule.interval == 0]
        if days and days[0] < first:
            days = [day for day in days if day >= first]
        yield days


def is_leap(year: int) -> bool:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def rule_walls(rule: Rule, start: datetime, near: datetime) -> Iterator[datetime]:
    """The wall times of a rule from the day of one on, in order; they may have no end."""
    left = rule.count or math.inf
    begin = start if rule.count else max(start, near)
    for days in rule_days(rule, start.date(), begin.date()):
        if rule.count and not rule.positions:  # what is before needs no look to be counted
            known = bisect_right(days, start.toordinal()), bisect_left(days, near.toordinal())
            left -= max(known[1] - known[0], 0) * len(rule.times)
            days = days[:known[0]] + days[max(known):]
        for wall in day_walls(rule, days):
            if wall > rule.last or left <= 0:
                return
            if wall >= start:
                left -= 1
                yield wall


def day_walls(rule: Rule, days: Iterable[int]) -> Iterator[datetime]:
    """The wall times of a rule on some days, of a turn those that its positions leave."""
    found = (datetime.fromordinal(day) + at for day in days for at in rule.times)
    if not rule.positions:
        return found
    found = list(found)
    STEPS.take(len(found))
    return iter(sorted(numbered_of(rule.positions, [found])))


def on_rule(rule: str, start: datetime, wall: datetime) -> bool:
    """Whether a wall time is one of those of a rule."""
    read = read_rule(rule, start)
    if read.count or read.positions:
        return next(followed(rule, start, wall), None) == wall
    day, year = wall.toordinal(), date(wall.year, 1, 1)
    kinds = year.weekday(), is_leap(wall.year), is_leap(wall.year - 1)
    return (start <= wall <= read.last and wall - at_midnight(wall) in read.times
            and turn_of(read, start.date())(day) % read.interval == 0
            and day - year.toordinal() in days_left(read.by, *kinds))


def followed(rule: str, start: datetime, near: datetime) -> Iterator[datetime]:
    """The wall times of a rule from one on, as if it was followed from its start."""
    ruled = rule_walls(read_rule(rule, start), start, near)
    return itertools.dropwhile(lambda wall: wall < near, ruled)


def walls(stretch: Stretch, near: datetime = datetime.min) -> Iterator[datetime]:
    """The wall times of all slots of a stretch in order, those of its rule from one on; maybe for
    ever.
    """
    start, listed = datetime.fromisoformat(stretch.start), sorted(listed_walls(stretch))
    ruled = followed(stretch.rule, start, near) if stretch.rule else ()
    skips, before = frozenset(stretch.skips), None
    for wall in heapq.merge(ruled, listed) if listed and ruled else ruled or listed:
        STEPS.take(1)
        key = wall.isoformat()
        if stretch.until and key >= stretch.until:
            return
        if wall != before and key >= stretch.since and not {key, key[:10]} & skips:
            yield wall
        before = wall


def moved_walls(stretch: Stretch) -> Iterator[datetime]:
    """The wall times of those slots of a stretch that are otherwise, in order."""
    start = datetime.fromisoformat(stretch.start)
    listed, skips = listed_walls(stretch), {*stretch.skips}
    for key in sorted(stretch.moved):
        wall = datetime.fromisoformat(key)
        STEPS.take(10)
        if (stretch.since <= key and (not stretch.until or key < stretch.until)
                and not {key, key[:10]} & skips
                and (wall in listed or stretch.rule and on_rule(stretch.rule, start, wall))):
            yield wall


def listed_walls(stretch: Stretch) -> set[datetime]:
    """The wall times of those slots of a stretch that no rule gives."""
    listed = stretch.dates if stretch.rule or stretch.dates else [stretch.start]
    STEPS.take(len(listed))
    return {datetime.fromisoformat(each.partition('/')[0]) for each in listed}


def slots(stretch: Stretch, begin: float, until: float,
          zone: tzinfo | None = None) -> Iterator[Slot]:
    """What a stretch wants of the time between two instants, as far as it is not over at the first.

    Args:
      zone: the zone of its wall times, where that has no name

    Raises:
      Invalid: that is more than MOST_OCCURRENCES.
    """
    zone, found = zone or read_zone(stretch.zone), 0
    day, lengths = timedelta(days=1), dict(each.split('/') for each in stretch.dates if '/' in each)
    longest = timedelta(seconds=stretch.length + stretch.exact + stretch.shift)
    first, last = (to_wall(instant(each), zone) for each in (begin, until))
    last += day - timedelta(seconds=stretch.shift)
    ruled = itertools.takewhile(lambda wall: wall < last, walls(stretch, first - longest - day))
    if stretch.moved:
        ruled = (wall for wall in ruled if wall.isoformat() not in stretch.moved)
        ruled = heapq.merge(ruled, moved_walls(stretch))
    for wall in ruled:
        key = wall.isoformat()
        shifted, vms = wall + timedelta(seconds=stretch.shift), stretch.vms
        length, exact = (lengths[key], 0) if key in lengths else (stretch.length, stretch.exact)
        if key in stretch.moved:
            shifted, length, vms, exact = [*stretch.moved[key], 0][:4]
            shifted = datetime.fromisoformat(shifted)
        start, end = window_of(shifted, int(length), zone, exact)
        STEPS.take(5)
        if end > begin and start < until:
            found += 1
            yield Slot('' if stretch.single else key, start, end, vms, stretch.resource)
        if found > MOST_OCCURRENCES:
            raise Invalid(f'the repetition has more than {MOST_OCCURRENCES} occurrences until '
                          f'{instant(int(until)):%Y-%m-%d}; let it end earlier')


def window_of(wall: datetime, length: int, zone: ZoneInfo, exact: int = 0) -> tuple[int, int]:
    """The instants of a wall time and of its end; never none between them.

    Args:
      length: seconds from there to the end by the clocks, and `exact` elapsed ones after that
    """
    start = from_wall(wall, zone)
    end = from_wall(wall + timedelta(seconds=length), zone) if length else start
    end += timedelta(seconds=exact)
    end = end if end > start else start + timedelta(seconds=length + exact)
    return int(start.timestamp()), int(end.timestamp())


def all_slots(stretches: Iterable[Stretch], begin: float, until: float,
              zone: tzinfo | None = None) -> list[Slot]:
    """What all stretches of a series want of a span of time, the earliest first."""
    found = {slot.key: slot for stretch in stretches for slot in slots(stretch, begin, until, zone)}
    return sorted(found.values(), key=lambda slot: slot.start)


def goes_on(stretches: Iterable[Stretch], after: float) -> bool:
    """Whether a series wants anything that begins after an instant."""
    return any(slot.start >= after for stretch in stretches
               for slot in slots(stretch, after, LAST.timestamp()))


def stretches_before(stretches: list[Stretch], key: str) -> list[Stretch]:
    """What a series is before a slot."""
    return [stretch._replace(until=min(stretch.until or key, key)) for stretch in stretches
            if (stretch.since or min([stretch.start, *stretch.dates])) < key]


def cut_stretches(stretches: list[Stretch], key: str, **changes) -> list[Stretch]:
    """A series that is otherwise from a slot on: shifted by so many seconds more, or with other
    values.
    """
    shift = changes.pop('shift', 0)
    after = [stretch._replace(since=max(stretch.since, key), shift=stretch.shift + shift, **changes)
             for stretch in stretches if not stretch.until or stretch.until > key]
    return stretches_before(stretches, key) + after


def endless(rule: str) -> str:
    """A rule without its UNTIL or COUNT."""
    return re.sub('(^|;)(UNTIL|COUNT)=[^;]*', '', rule).strip(';')


def rule_from(stretches: list[Stretch], key: str) -> str:
    """The RRULE that the occurrences from a slot on follow as they are now; '' if none says it."""
    stretch = next((each for each in reversed(stretches) if each.since <= key), stretches[0])
    rule = shifted_rule(stretch) if stretch.rule and stretch.shift else stretch.rule
    if not rule or not stretch.until:
        return rule
    last = datetime.fromisoformat(stretch.until) + timedelta(seconds=stretch.shift - 1)
    return f'{endless(rule)};UNTIL={last:%Y%m%dT%H%M%S}'


def shifted_rule(stretch: Stretch) -> str:
    """The RRULE of occurrences that are all moved by as much; '' if there is none."""
    parts = dict(part.split('=') for part in stretch.rule.split(';'))
    first = datetime.fromisoformat(stretch.start)
    moved = first + timedelta(seconds=stretch.shift)
    days = (moved.date() - first.date()).days
    by = {name for name in parts if name.startswith('BY')}
    if by & {'BYHOUR', 'BYMINUTE', 'BYSECOND'}:
        return ''
    if 'UNTIL' in parts:
        last = read_until(parts['UNTIL']) + timedelta(seconds=stretch.shift)
        parts['UNTIL'] = f'{last:%Y%m%dT%H%M%S}'
    if days and parts['FREQ'] in ('DAILY', 'WEEKLY') and by <= {'BYDAY'}:
        if 'INTERVAL' in parts:  # which weeks count depends on the day on which they begin
            parts['WKST'] = parts.get('WKST', 'MO')
        parts |= {name: later_days(parts[name], days) for name in parts.keys() & {'BYDAY', 'WKST'}}
    elif days and (by or max(first.day, moved.day) > 28 or moved.day - first.day != days):
        # Months differ in length.
        return ''
    return ';'.join(f'{name}={value}' for name, value in parts.items())


def later_days(text: str, days: int) -> str:
    """Weekdays that are so many days later."""
    return ','.join(WEEKDAYS[(WEEKDAYS.index(day) + days) % 7] for day in text.split(','))


def unskipped(stretch: Stretch, key: str) -> Stretch:
    """A stretch that has the occurrence of a slot again, of a day that was left out only that."""
    day, skips = key[:10], [each for each in stretch.skips if each not in (key, key[:10])]
    if day in stretch.skips:
        every = (wall.isoformat() for wall in walls(stretch._replace(skips=())))
        until_then = itertools.takewhile(lambda slot: slot[:10] <= day, every)
        skips += [slot for slot in until_then if slot[:10] == day and slot != key]
    return stretch._replace(skips=tuple(skips))


def stored_stretches(stretches: Iterable[Stretch]) -> str:
    return json.dumps([stretch._asdict() for stretch in stretches], separators=(',', ':'))


def read_stretches(text: str) -> list[Stretch]:
    return [Stretch(**stretch) for stretch in json.loads(text)] if text else []


# Config ######################################################################
#
# A setting comes from its environment twin (CMRES_PORT), else from the file, else it has the
# default below. The file is --config, else CMRES_CONFIG, else config.ini where there is one.


SECTIONS = ('cmres', 'credentials', 'identities', 'texts')
#: What has a name on a cloud.
KINDS = ('flavor', 'image', 'network', 'key', 'security_group', 'server')
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
    'pending': '{label} waits for a word\n{sentence}.',
    'admitted': '{label} is reserved now\n{vms} vms on {resource} from {start} to {end}, after '
                'waiting.',
    'approved': '{label} is approved\n{sentence}.',
    'rejected': '{label} stays as it was\n{sentence}.',
    'maintenance': '{label} is in the way of a maintenance\n{sentence}.',
    'unused': '{label} is not used\n{sentence}.',
    'trouble': '{label}: not all VMs are up\n{sentence}.',
    'vanished': '{label}: VMs have vanished\n{sentence}.',
    'stopped': '{label}: VMs are stopped\n{sentence}.',
    'snapshot': '{label}: VMs are saved as images\n{sentence}.',
    'forced': '{label}: VMs were deleted without what was agreed\n{sentence}.',
    'foreign': '{label}: VMs that people started themselves\n{sentence}.',
    'held': 'your calendar asks for much less than before\n{sentence}',
    'dropped': 'no more mails today\n{sentence}.',
}
#: What stands in braces there: the fields of a reservation as answers show it, and of the event.
TEXT_FIELDS = frozenset((
    'sentence message actor id label user project resource cell cloud region aggregate vms flavor '
    'image network key security_groups metadata server at_end notify vcpus ram classes lead '
    'description personal repeat tz start end cancelled added changed up fault request host '
    'state').split())


def setting(default, why: str, least=None, most=10**9):
    return dataclasses.field(default=default, metadata={'why': why, 'least': least, 'most': most})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that can be set; once read, only what `read_again` takes is ever changed."""
    database: str = setting('cmres.db',
                            'the SQLite file that holds everything; not on a network file system')
    key: str = setting('', 'the file that signs cookies and remembers the database; if empty, the '
                       'database with .key')
    host: str = setting('127.0.0.1',
                        'the address that `serve` listens on; put a TLS proxy before any other')
    port: int = setting(8080, 'the port that `serve` listens on', 0, 65535)
    threads: int = setting(8, 'requests that are answered side by side', 1)
    slow_per_user: int = setting(2, 'requests of one user that may wait for clouds and calendars, '
                                 'or compute for long, at the same time', 1)
    slow_per_target: int = setting(4, 'requests that may wait for one account on a cloud, or for '
                                   'one host, at the same time', 1)
    outside_timeout: float = setting(
        50.0, 'seconds that one request may wait for clouds and calendars in all', 0.1)
    url: str = setting('', 'a cmres server: with it, commands talk to that server and not to the '
                           'database')
    token: str = setting('', 'the token for that server')
    connections: int = setting(
        2000, 'connections that are open at the same time; for one more, the oldest on which '
        'nothing is answered is closed', 10, 100_000)
    connections_per_address: int = setting(200, 'those of one address, also of a proxy', 1)
    requests_per_address: int = setting(
        12000, 'requests from one address within a minute; 0: any number', 0)
    requests_per_user: int = setting(
        3000, 'requests of one user within a minute; 0: any number. Admins have no such limit', 0)
    mib_per_address: int = setting(
        2000, 'MiB to and from one address within a minute; 0: any number', 0)
    mib_per_user: int = setting(
        500, 'MiB to and from one user within a minute; 0: any number. Admins have no such limit',
        0)
    cpu_per_user: float = setting(
        30.0, 'seconds of computing for dry runs and questions of one user within a minute; 0: any '
        'number. Admins have no such limit', 0.0)
    wrong_tokens: int = setting(
        30, 'wrong tokens from one address within a minute; who sends more is answered 429', 1)
    trusted_proxies: str = setting(
        '127.0.0.1, ::1', 'addresses and networks of proxies; what they say last in '
        'X-Forwarded-For counts for limits and the log, and for nothing else')
    metrics: str = setting('token', "who may read /metrics: token (with an admin's token), open "
                           '(everybody) or off (nobody)')
    log_format: str = setting('text', 'how lines of the log are written: text or json')
    log_requests: bool = setting(
        True, 'whether the log has a line for each request and for each call to a cloud')
    drain: float = setting(30.0, 'seconds that requests under way may go on after SIGTERM', 0.0)
    min_disk: int = setting(
        100, 'MiB on the disk of the database; with less free, /readyz warns', 0)
    timezone: str = setting('UTC', 'the zone of times typed without an offset, and of tables; '
                                   'without it, that of the machine')
    workers: int = setting(32, 'calls to one cloud that run side by side', 1)
    call_timeout: float = setting(60.0, 'seconds after which a call to a cloud is given up', 0.1)
    boot_timeout: float = setting(900.0, 'seconds after which a server that does not come up is '
                                         'made anew', 0.1)
    settle: float = setting(15.0, 'seconds after a lost answer before a missing server is made '
                                  'again', 0.0)
    common_names: str = setting(
        '', "what users may name on an account that is not their own project's, besides what is "
        'public there: KIND:NAME,KIND:NAME')
    poll: float = setting(1.0, 'seconds between looks at servers that are coming or going', 0.01)
    sweep: float = setting(60.0, 'seconds between looks at servers that should just be there', 0.01)
    retry_first: float = setting(5.0, 'seconds before a failed boot or delete is tried again; '
                                      'doubles each time', 0.01)
    retry_most: float = setting(300.0, 'seconds that this pause grows to at most', 0.01)
    lease: float = setting(6.0, 'seconds after which another scheduler takes over from one that is '
                                'silent', 0.1)
    notice: float = setting(600.0, 'seconds before a start and an end at which they are announced',
                            0.0)
    end_grace: float = setting(600.0, 'seconds after an end at which what is not stopped, shelved '
                                      'or saved goes', 0.0)
    webhook: str = setting('', 'an http(s) address that is told of every event that [texts] has '
                               'words for')
    webhook_secret: str = setting('',
                                  'the key of the HMAC-SHA256 that signs what webhooks are sent')
    private_addresses: bool = setting(
        False, 'whether webhooks and calendars may be in private networks and on this machine')
    mail_server: str = setting('', 'host:port of the SMTP server that takes notices; without one, '
                                   'no mail is sent')
    mail_from: str = setting('cmres@localhost', 'the sender of mails')
    mail_domains: str = setting(
        '', 'the domains that mails may go to, with commas between; empty: any')
    notices_per_day: int = setting(
        200, 'mails that are sent for one user within a day; what is beyond is dropped', 0)
    own_token_days: int = setting(
        365, 'days for which people may make and renew tokens of their own at most', 1, 36500)
    tokens_per_user: int = setting(
        50, 'tokens that one user may have in a project; 0: any number', 0)
    feeds_per_user: int = setting(
        50, 'calendar feeds that one user may have in a project; 0: any number', 0)
    subscriptions_per_user: int = setting(
        50, 'calendars that one user may subscribe to in a project; 0: any number', 0)
    horizon: int = setting(366,
                           'days ahead for which the occurrences of a repetition are reserved', 1,
                           3660)
    calendar_poll: float = setting(300.0, 'seconds between looks at a calendar that somebody '
                                          'subscribed to', 0.1)
    address: str = setting('',
                           'how people reach `serve`, for links, such as https://cmres.example.org')
    signed_in: float = setting(43200.0, 'seconds after which people sign in to the page anew', 0.1)
    login: str = setting('ssh {address}',
                         'how people log in to a machine, as their calendar tells them')
    patience: float = setting(86400.0, 'seconds after which no later request is let pass one that '
                                       'waits', 0.0)
    exempt_longest: float = setting(
        86400.0, 'seconds that a reservation may take at most to be exempt from limits', 0.0)
    end_foreign: bool = setting(False, 'whether machines that people booted by hand on what they '
                                       'had reserved are '
                                'deleted at its end')
    retention: int = setting(400, 'days after which what is over is forgotten; reports keep its '
                                  'sums', 1, 36500)
    project_texts: int = setting(
        100, 'MiB of user data, descriptions and metadata that a project may keep here', 1, 10**6)
    orphan_grace: float = setting(60.0, 'age in seconds at which a server of ours that nothing '
                                        'wants is removed', 0.0)
    verify_every: float = setting(
        3600.0, 'seconds between two checks of the database file for damage', 0.1)
    max_pass_age: float = setting(
        180.0, 'seconds after the last pass of the life cycle at which /readyz warns', 0.1)
    simulated_boot: float = setting(3.0, 'seconds that a boot takes on the cloud `simulated`', 0.0)
    simulated_failures: float = setting(0.0, 'share of boots that end in ERROR there, 0 to 1', 0.0,
                                        1.0)
    simulated_vms: int = setting(0, 'servers that fit there; 0 means any number', 0)
    simulated_latency: float = setting(0.0, 'seconds that each call takes there', 0.0)
    credentials: dict = dataclasses.field(default_factory=dict)
    identities: dict = dataclasses.field(default_factory=dict)
    texts: dict = dataclasses.field(default_factory=TEXTS.copy)
    path: str = dataclasses.field(default='', compare=False)      # its file, if there is one
    stamp: tuple = dataclasses.field(default=(), compare=False)   # of that file, when it was read
    sources: dict = dataclasses.field(default_factory=dict, compare=False)  # of what is set, where

    @property
    def zone(self) -> ZoneInfo:
        return read_zone(self.timezone)

    @property
    def common(self) -> frozenset[str]:
        """The setting `common_names`, one by one; Invalid if one of them is none."""
        names = [each.strip() for each in self.common_names.split(',') if each.strip()]
        for each in names:
            kind, _, name = each.partition(':')
            if kind not in KINDS or not name:
                raise Invalid(f"setting common_names: '{each}' is not KIND:NAME, such as "
                              f"key:course; the kinds are {', '.join(KINDS)}{nearest(kind, KINDS)}")
        return frozenset(names)

    @property
    def proxies(self) -> list:
        """The setting `trusted_proxies`, one by one; Invalid if one of them is none."""
        return read_networks(self.trusted_proxies)

    def is_proxy(self, peer: str) -> bool:
        """Whether an address is that of a trusted proxy."""
        import ipaddress
        with suppress(ValueError):
            found = ipaddress.ip_address(peer)
            return any(found in each for each in self.proxies)
        return False

    def check_choices(self) -> None:
        """Invalid if a setting that is one of some words is another."""
        for name, words in WORDS_OF.items():
            if (said := getattr(self, name)) not in words:
                raise Invalid(f"setting {name}: '{said}' is none of {', '.join(words)}"
                              f'{nearest(said, words)}')

    def may_tell(self, target: str) -> bool:
        """Whether notices may go to an address: of the web, or a mail address of `mail_domains`."""
        domains = self.mail_domains.lower().replace(',', ' ').split()
        return is_web(target) or not domains or target.rpartition('@')[2].lower() in domains

    def told_time(self, seconds: float, tz: str = '') -> str:
        """An instant as sentences tell it: in the zone of a reservation, else of the service."""
        return format_moment(instant(seconds), read_zone(tz or self.timezone))

    def take(self, **values) -> None:
        """Changes settings for all who have this object."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def read_again(self) -> Config:
        """Itself, with the sections of AGAIN from its file if that has changed since.

        A file that can't be read leaves them as they were; the log says why, once.
        """
        stamp = file_stamp(self.path)
        if stamp != self.stamp:
            self.take(stamp=stamp)
            try:
                sections = read_config_file(self.path)
                self.take(**{name: sections[name] for name in AGAIN})
            except Invalid as error:
                stays = ' and '.join(f'[{name}]' for name in AGAIN)
                log.warning('%s; what it said before in %s stays', error, stays)
        return self


#: Settings that are one of some words.
WORDS_OF = {'metrics': ('token', 'open', 'off'), 'log_format': ('text', 'json')}


@functools.lru_cache
def read_networks(text: str) -> list:
    """Addresses and networks with commas between; Invalid if one of them is none."""
    import ipaddress
    found = []
    for each in filter(None, map(str.strip, text.split(','))):
        try:
            found.append(ipaddress.ip_network(each, strict=False))
        except ValueError:
            raise Invalid(f"setting trusted_proxies: '{each}' is no address and no network such as "
                          '10.0.0.0/8') from None
    return found


SETTINGS = {field.name: field for field in dataclasses.fields(Config) if 'why' in field.metadata}
#: The sections that need no restart: a new project wants its account, and VMs go on meanwhile.
AGAIN = ('credentials', 'identities')


def load_config(path: str | None = None, environ: dict = os.environ) -> Config:
    """Settings from the environment, a file and the defaults.

    Raises:
      Invalid: the file can't be read, a key is unknown or a value is of the wrong kind.
    """
    path = path or environ.get('CMRES_CONFIG') or (
        'config.ini' if os.path.exists('config.ini') else '')
    stamp = file_stamp(path)  # before it is read: what changes meanwhile is read again
    sections = read_config_file(path) if path else dict.fromkeys(SECTIONS, {})
    twins = {name[6:].lower(): text for name, text in environ.items()
             if name.startswith('CMRES_') and name not in ('CMRES_CONFIG', 'CMRES_CALENDARS')}
    texts = sections['cmres'] | twins
    sources = {name: f'CMRES_{name.upper()}' if name in twins else path for name in texts}
    for name in sections['texts']:
        if name not in TEXTS:
            raise Invalid(f"{path}: there is no event '{name}' to be told of{nearest(name, TEXTS)}")
        check_template(f'{path}: [texts] {name}', sections['texts'][name])
    texts.setdefault('timezone', machine_zone(environ))
    config = Config(**{name: read_setting(name, text) for name, text in texts.items()},
                    credentials=sections['credentials'], identities=sections['identities'],
                    texts=TEXTS | sections['texts'], path=path, stamp=stamp, sources=sources)
    # What is wrong with them is told here, not when they are used.
    config.zone, config.common, config.proxies, config.check_choices()
    return config


def check_template(where: str, template: str) -> None:
    """Refuses words for an event that could not be filled in; Invalid says where and why."""
    from string import Formatter
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
        for field in fields:
            if field not in TEXT_FIELDS:
                hint = nearest(field, TEXT_FIELDS)
                raise Invalid(f'{where}: there is no field {{{field}}}{hint}')
        template.format_map(dict.fromkeys(TEXT_FIELDS, 'text'))
    except (ValueError, LookupError) as error:  # LookupError: a field inside the format of another
        raise Invalid(f"{where}: '{first_line(error)}'; write fields as {{label}}, and {{{{ for "
                      'a brace') from None


def is_web(target: str) -> bool:
    """Whether somebody is told by a webhook, and not by mail."""
    return target.startswith(('http://', 'https://'))


def file_stamp(path: str) -> tuple:
    """What changes when a file does; nothing if there is none."""
    try:
        found = os.stat(path)
        return found.st_mtime_ns, found.st_size, found.st_ino
    except OSError:
        return ()


def read_config_file(path: str) -> dict[str, dict]:
    """The texts of each section."""
    import configparser
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    try:
        with open(path, encoding='utf-8') as file:
            parser.read_file(file)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        why = str(error).splitlines()[0]
        raise Invalid(f"can't read the configuration '{path}': {why}") from None
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
        what = ('neither true nor false' if isinstance(field.default, bool)
                else f'not a number such as {field.default}')
        raise Invalid(f"setting {name}: '{text}' is {what}") from None
    least, most = field.metadata['least'], field.metadata['most']
    if least is not None and not least <= value <= most:
        raise Invalid(f'setting {name}: {text} is not between {least} and {most}')
    return value


# Metrics #####################################################################
#
# What this process counts, for /metrics. Labels are names from a list or of the operator, never
# users, addresses or labels of reservations: of those there is no end.

#: The upper bounds of histograms, in seconds.
BOUNDS = {'request_seconds': (0.005, 0.02, 0.1, 0.5, 2, 10, 60),
          'cloud_call_seconds': (0.1, 0.5, 2, 10, 60, 300),
          'start_delay_seconds': (5, 15, 30, 60, 120, 300, 900, 3600),
          'lock_wait_seconds': (0.001, 0.01, 0.1, 1, 10, 60)}
#: What is measured, as Prometheus tells people; what ends in _total only grows.
MEASURED = {
    'requests_total': 'requests, by operation and status',
    'request_seconds': 'time until requests were answered, by operation',
    'refusals_total': 'requests that were refused, by the kind of the error',
    'limited_total': 'requests that were more than a setting allows, by the setting',
    'hung_up_total': 'changes that were not made since the client had hung up',
    'connections_closed_total': 'connections closed for newer ones, by the bound that was reached',
    'wrong_tokens_total': 'tokens that were refused',
    'sign_ins_total': 'people who signed in to the page',
    'cloud_call_seconds': 'time of calls to clouds, by cloud, verb and result',
    'start_delay_seconds': 'seconds from the planned start of a VM until it was ready, by cloud',
    'lock_wait_seconds': 'time for which changes waited for their turn to write',
    'events_total': 'events in the event log, by code: added, refused, admitted, failed and so on',
    'reservations_waiting': 'requests on the waiting list',
    'reservations_pending': 'reservations and changes that need an answer',
    'capacity': 'capacity of a resource, by resource class; none where it is unlimited',
    'used': 'amount of a resource that is reserved now, by resource class',
    'servers': 'VMs that are not deleted, by cloud and state',
    'cloud_left_alone': 'whether a cloud is left alone after failures: 1 or 0',
    'cloud_failures': 'failures of a cloud in a row',
    'pass_age_seconds': 'seconds since the life cycle has made a pass',
    'leader': 'the host of which a scheduler acts now',
    'store_bytes': 'size of the database with its write-ahead log',
    'disk_free_bytes': 'free space on the disk of the database',
    'notices_waiting': 'notices that have not arrived yet',
    'notice_age_seconds': 'for how long the oldest notice that has not arrived has been waiting',
    'store_damaged': 'whether the last check of the database found damage: 1 or 0',
    'resident_bytes': 'memory of this process',
    'version': 'the version of cmres'}


class Metrics:
    """Sums and histograms of this process, since it began; any thread may add to them."""

    def __init__(self):
        self.lock = threading.Lock()
        self.sums: dict[tuple, float] = defaultdict(float)  # by name and labels
        self.spreads: dict[tuple, list] = {}                # numbers by bound, and the sum

    def count(self, name: str, number: float = 1, **labels: str) -> None:
        """Adds to a sum."""
        with self.lock:
            self.sums[name, tuple(labels.items())] += number

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds a value to a histogram."""
        self.begin(name, **labels)
        with self.lock:
            spread = self.spreads[name, tuple(labels.items())]
            spread[bisect_left(BOUNDS[name], value)] += 1
            spread[-1] += value

    def begin(self, name: str, **labels: str) -> None:
        """Begins a histogram, empty: Prometheus sees no increase where there was nothing before."""
        with self.lock:
            nothing = [0] * (len(BOUNDS[name]) + 1) + [0.0]
            self.spreads.setdefault((name, tuple(labels.items())), nothing)

    def samples(self) -> list[tuple]:
        """All of it as (name, labels, value), histograms as Prometheus has them."""
        with self.lock:
            sums = [(name, labels, value) for (name, labels), value in self.sums.items()]
            spreads = [(*key, [*spread]) for key, spread in self.spreads.items()]
        return sums + [each for spread in spreads for each in buckets_of(*spread)]


def buckets_of(name: str, labels: tuple, spread: list) -> Iterator[tuple]:
    """The samples of one histogram: how many were at most each bound, their sum and number."""
    *numbers, total = spread
    for bound, number in zip((*BOUNDS[name], '+Inf'), itertools.accumulate(numbers)):
        yield f'{name}_bucket', (*labels, ('le', f'{bound}')), number
    yield f'{name}_sum', labels, total
    yield f'{name}_count', labels, sum(numbers)


def exposition(samples: Iterable[tuple]) -> str:
    """Samples in the text format of Prometheus (0.0.4), which needs no library: a line for each."""
    lines: dict[str, list[str]] = defaultdict(list)
    for name, labels, value in samples:
        family = re.sub('_(bucket|sum|count)$', '', name)
        told = ','.join(f'{key}="{escaped_label(text)}"' for key, text in labels)
        lines[family].append(f"cmres_{name}{told and f'{{{told}}}'} {value:.10g}")
    return ''.join(f'# HELP cmres_{name} {MEASURED[name]}\n'
                   f'# TYPE cmres_{name} {kind_of_metric(name)}\n'
                   + '\n'.join(found) + '\n' for name, found in lines.items())


def escaped_label(text) -> str:
    return f'{text}'.replace('\\', r'\\').replace('"', r'\"').replace('\n', r'\n')


def kind_of_metric(name: str) -> str:
    return 'histogram' if name in BOUNDS else 'counter' if name.endswith('_total') else 'gauge'


METRICS = Metrics()


@contextmanager
def timed(name: str, **labels: str) -> Iterator[dict]:
    """Measures what is done inside; what it yields may get more labels."""
    began = time.monotonic()
    try:
        yield labels
    finally:
        METRICS.observe(name, time.monotonic() - began, **labels)


def told_fields(logger: logging.Logger, what: str, **fields) -> None:
    """A line of the log that says something of each field; what has no value is left out."""
    fields = {name: each for name, each in fields.items() if each not in (None, '')}
    logger.info(what, extra={'fields': fields})


log_requests = logging.getLogger('cmres.requests')
log_calls = logging.getLogger('cmres.calls')


class Lines(logging.Formatter):
    """Lines of the log, as text or as JSON, in which nothing is unseen."""

    def __init__(self, form: str = 'text'):
        super().__init__('%(asctime)sZ %(levelname)s %(message)s')
        self.converter, self.form = time.gmtime, form

    def format(self, record):
        fields = getattr(record, 'fields', {})
        if self.form == 'json':
            return legible(json.dumps(self.whole(record) | fields, ensure_ascii=False, default=str))
        told = ' '.join(f'{name}={self.word(each)}' for name, each in fields.items())
        return legible(f'{super().format(record)} {told}'.rstrip())

    def whole(self, record) -> dict:
        """What every line has as JSON."""
        at = instant(record.created).isoformat(timespec='milliseconds')
        made = {'time': at, 'level': record.levelname, 'message': record.getMessage()}
        trace = record.exc_info and self.formatException(record.exc_info)
        return made | ({'trace': trace} if trace else {})

    def word(self, value) -> str:
        """A value that is told from the next field."""
        text = f'{value}'
        plain = re.fullmatch(r'[\w.:/@,+<>-]+', text)
        return text if plain else json.dumps(text, ensure_ascii=False)


# Calls #######################################################################
#
# An operation is described once: by the signature of a method marked @api. Routes, commands,
# client methods, help and /openapi.json are derived from that mark, and `bind` is the one reader
# of arguments for all of them: the same mistake gives the same sentence everywhere.

Label = NewType('Label', str)      # a reservation's or a resource's own name
NewLabel = NewType('NewLabel', str)  # one that is given now
Place = NewType('Place', str)      # a resource's name, or - for one found by its place
Name = NewType('Name', str)        # somebody else's name: a user, a flavor, an image
Text = NewType('Text', str)        # free text, up to 64 KiB
# text too; on the command line, the name of the file that holds it
File = NewType('File', str)
Count = NewType('Count', int)      # 1 to a million
Page = NewType('Page', int)        # 1 to 10000 lines of a list
Cursor = NewType('Cursor', str)    # where a list goes on: START/ID of the last line seen, or its id
Figure = NewType('Figure', int)    # 0 to 10^12
Most = NewType('Most', int)        # a capacity figure; `unlimited` is UNLIMITED
Span = NewType('Span', timedelta)  # a length of time
When = datetime | timedelta        # an instant, or a length from what comes before it
# that, or a date: the whole of it, in the zone of what it is about
Day = date | datetime | timedelta
Names = NewType('Names', list)     # several names; text is split at commas
Pairs = NewType('Pairs', dict)     # names with values; text is k=v,k=v
Classes = NewType('Classes', dict)  # resource classes with figures; text is CUSTOM_GPU=2,...
Hosts = NewType('Hosts', list)     # names of hosts; text is m01,m02 or m[01-02]
# parts of a request, each with a resource or place and vms; text is gpu:2,cpu:20
Parts = NewType('Parts', list)
Zone = NewType('Zone', str)        # a time zone; the zone of the bare times beside it
Repeat = NewType('Repeat', str)    # a repetition, in words or as an RRULE
Clash = NewType('Clash', str)      # refuse, skip or shift=DURATION
# iCalendar text, up to 16 MiB; on the command line, the file that holds it
Ics = NewType('Ics', str)
Source = NewType('Source', str)    # that, or the http(s) address of it
Url = NewType('Url', str)          # an http(s) address, which may be a secret
# many reservations; on the command line, a CSV, JSON or YAML file
Rows = NewType('Rows', list)

UNLIMITED = -1
WEB = 'https?://[!-~]+'
CLASHES = ('refuse', 'skip', 'shift')
NO_LABELS = ('add', 'delete', '-', '.', '..')  # addresses read them in another sense
ANY = '-'  # for an argument that filters: anything, as if it were not given
FILTERS = {'label', 'user', 'project', 'resource', 'cell', 'cloud', 'region', 'aggregate', 'vms',
           'start', 'end'}

#: What each argument means, in the one sense that it has in every operation.
WORDS = {
    'after': 'the earliest start, or in a list START/ID of the last line seen, or its id',
    'aggregate': 'host aggregate of the resource',
    'at_end': 'what becomes of the machines at the end: delete, stop, shelve or snapshot (an '
              'image, then delete)',
    'before': 'the latest end',
    'by': 'how much longer, such as +1h',
    'cell': 'cell of the resource',
    'classes': 'other resource classes of Placement, with figures: CUSTOM_GPU=2',
    'cloud': 'cloud of the resource: a name in clouds.yaml, or simulated',
    'count': 'how many; of a series, how many slots; for a delete by filter, the number that it '
             'must hit',
    'description': 'free text for people',
    'dry_run': 'check and answer as if it were done, and keep nothing',
    'duration': 'length of the window, such as 2h, 90min, 1.5h or 1d12h',
    'end': 'a time, or a length from the start such as +2h; 17:00 is the next one after the start',
    'file': 'an .ics file of at most 16 MiB',
    'flavor': 'flavor of the machines, by name or id; its vcpus and ram count',
    'force': 'do it although occurrences that are admitted already would no longer fit',
    'following': 'not only that occurrence: all after it too',
    'holidays': 'an .ics file or address; on the days of its all-day events nothing is reserved',
    'host': 'all of a host of the resource, by its name, m[01-05] for several; of `serve`, the '
            'address to listen on',
    'id': 'the id that the list shows',
    'image': 'image to boot, by name or id; without one, capacity is held and nothing boots',
    'kept': 'the VMs that were stopped or shelved at the end of a reservation and stay',
    'key': 'key pair to put into the machines',
    'lasts': 'for how long the token is good, such as 90d',
    'label': 'your own name for it: 1 to 64 letters, digits, . _ -',
    'lead': 'how long before the start the machines are booted; held as well',
    'limit': 'at most so many lines',
    'metadata': 'metadata of the machines: k=v,k=v',
    'name': 'name of the resource: 1 to 64 letters, digits, . _ -',
    'network': 'network of the machines, by name or id; else what the cloud chooses',
    'notify': 'mail addresses and http(s) addresses that are told what happens, with commas '
              'between',
    'occurrence': 'of a series, the one that starts at this time or on this date',
    'on_conflict': 'what a series does where one does not fit: refuse all, skip it, or '
                   'shift=DURATION at most',
    'named': 'whether hosts can be reserved by their names',
    'part': 'one of several parts that are reserved together or not at all: RESOURCE:VMS, or '
            ':FLAVOR:IMAGE as well',
    'partial': 'take the lines that fit, instead of all or nothing',
    'project': 'project that it belongs to',
    'purpose': 'what the token is for, such as laptop',
    'ram': 'most MiB of memory; with none, or `unlimited`, no limit',
    'region': 'region of the resource',
    'rename': 'the new name',
    'repeat': 'daily, weekdays, weekly on tue,thu, every other tue, monthly on last fri, or an '
              'RRULE',
    'resource': 'name of the resource, or - for one found by its place',
    'role': 'admin, user or reader',
    'mode': 'whom Nova lets boot there: exclusive (who has reserved), shared (others too, while it '
            'is free), or open',
    'hold': 'for how long it must stay free for others to boot there, such as 1h',
    'resources': 'names of resources, with commas between',
    'aggregates': 'names of aggregates, with commas between; without any, those that are marked '
                  'already',
    'ahead': 'the furthest start from now, such as 30d',
    'approval': 'for how long a reservation there is held until an admin approves it, such as 2d; '
                '0s needs none',
    'by_whom': 'project, user or resource',
    'confirm': 'for how long it is held for you to `accept` it, once there is room; without one, '
               'it is yours at once',
    'exempt': 'reservations of at most a day that begin within that from now are not limited, such '
              'as 4h',
    'least_notice': 'the nearest start from now, such as 1h',
    'longest': 'the longest window, such as 7d',
    'most_vms': 'most machines at once',
    'no_show': 'after how long one that nobody boots on is released, such as 30m; 0s never',
    'priority': 'who comes first of those that wait: the higher',
    'reason': 'why, for those who read of it',
    'then': 'what becomes of what is booked already: notify, move or cancel',
    'vcpu_hours': 'most vcpu-hours that are reserved from now on',
    'wait': 'if it does not fit, wait until it does',
    'waiting': 'most requests that wait',
    'personal': 'only the user, not all of the project, may boot there through Nova',
    'rows': 'CSV, JSON or YAML with one reservation a line, fields named as in `add`',
    'security_groups': 'security groups of the machines, with commas between',
    'scopes': 'what alone the token is good for: read, claim, calendar; without any, for all',
    'seed': 'the same seed gives the same reservations',
    'shell': 'bash, zsh or fish',
    'server': 'a machine that you have, by name or id, instead of an image: it is started and '
              'stopped, never deleted',
    'skip_dates': 'dates without an occurrence, with commas between',
    'since': 'only what happened or was planned from then on; of sums, else the last 30 days',
    'start': 'a time: 2026-12-01 09:00, 9:00, tomorrow 9:00, mon 9:00, now, or +2h from now',
    'state': 'states, with commas between; without any, all that are not over',
    'undo': 'have it again instead',
    'tz': 'zone of times without an offset, and the one whose clocks a series goes by',
    'until': 'an instant, or a length from the present end such as +2h; of a series, its last date',
    'url': 'the http(s) address of a calendar; it is kept as a secret',
    'user': 'user that it belongs to',
    'whole_project': 'not only your own reservations: all of the project',
    'user_data': 'file that the machines are given for cloud-init',
    'vcpus': 'most vcpus; with none, or `unlimited`, no limit',
    'vms': 'number of machines',
}

REQUIRED = inspect.Parameter.empty
READER, USER, ADMIN = 'reader', 'user', 'admin'
ROLES = (READER, USER, ADMIN)  # each may do what those before it may


@dataclasses.dataclass
class Operation:
    """A published method: its routes, who may call it, what it takes and answers.

    A route is a verb, a path and fixed arguments. What makes something says in `made` at which
    path that is found: its answer is 201.
    """
    name: str
    method: Callable
    role: str
    routes: list
    made: str = ''

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        signature = inspect.signature(self.method, eval_str=True)
        return {name: each for name, each in signature.parameters.items()
                if name not in ('self', 'config', 'asked')}

    @functools.cached_property
    def answers(self):
        """The type of its answer."""
        return inspect.signature(self.method, eval_str=True).return_annotation

    @property
    def changes(self) -> bool:
        return self.routes[0][0] != 'GET'

    @property
    def words(self) -> str:
        """The command, as people type it."""
        return self.name.strip('_').replace('_', ' ')

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.method).splitlines()[0]


API: dict[str, Operation] = {}


def api(verb: str, path: str, role: str | None = None, made: str = '', **fixed):
    """Publishes a method; the topmost of several marks is the address that clients use.

    Args:
      role: the least role that may call it; reader for a GET, else user
      made: where that is found which it makes, its parts named as fields of the answer
      fixed: arguments that this address stands for
    """
    def publish(method):
        known = API.get(method.__name__)
        if known:
            known.routes.insert(0, (verb, path, fixed))
            known.made = made or known.made
            return method
        needed = role or (READER if verb == 'GET' else USER)
        API[method.__name__] = Operation(
            method.__name__, method, needed, [(verb, path, fixed)], made)
        return guarded_by_role(method)
    return publish


def guarded_by_role(method):
    """Refuses before a call an actor whose role is too small, and one too many that takes long.

    A method that has the parameter `asked` gets there all its arguments by name.
    """
    usual = {name: each.default for name, each in inspect.signature(method).parameters.items()}
    names = [name for name in usual if name not in ('self', 'asked')]

    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        if 'asked' in usual:
            given = dict(zip(names, args)) | kwargs
            kwargs['asked'] = {name: usual[name] for name in names} | given
        needed = API[method.__name__].role
        if ROLES.index(self.actor.role) < ROLES.index(needed):
            raise Forbidden(f"{API[method.__name__].words} needs the role {needed}; "
                            f"{self.actor.user} is {self.actor.role}")
        self.actor.refuse_out_of_scope(API[method.__name__])
        takes_long = method.__name__ in LONG or any(kwargs.get(name) for name in LONG_BY)
        asks_only = not API[method.__name__].changes or kwargs.get('dry_run')
        with (self.shares.charging(self.actor) if asks_only else nullcontext(),
              self.shares.computing() if takes_long else nullcontext()):
            return method(self, *args, **kwargs)
    return checked


#: What may compute for seconds: calendars and many lines at once, and by these arguments, series.
LONG = ('import_', 'load', 'generate')
LONG_BY = ('repeat', 'holidays')


class Here(NamedTuple):
    """Where and when arguments are read: the zone of bare times, and the instant that `now` means.

    A bare clock time is the first `after` that instant, or after `now` where it is None.
    """
    zone: ZoneInfo
    now: datetime
    after: datetime | None = None


def bind(operation: Operation, given: dict, here: Here) -> dict:
    """The arguments of a call, read from text or JSON by the types of the method's signature.

    Raises:
      Invalid: one is unknown, missing or malformed; the sentence names it.
    """
    parameters = operation.parameters
    refuse_unknown(operation, given)
    anything = {name for name in FILTERS & given.keys()
                if given[name] == ANY and parameters[name].default is not REQUIRED}
    given = {name: value for name, value in given.items() if value is not None
             and name not in anything}
    if given.get('part'):  # the parts name the resources
        given = {'resource': ANY} | given
    missing = [name for name, each in parameters.items() if each.default is REQUIRED
               and name not in given]
    if missing:
        raise Invalid(f"{missing[0]} is missing: {WORDS[missing[0]]}")
    if given.get('tz'):
        here = here._replace(zone=read_zone(read_argument('tz', given['tz'], Zone, here)))
    read = {}
    # what others come after is read first
    for name in sorted(given, key=lambda name: name in AFTER):
        later = here._replace(after=start_of(read, AFTER.get(name), here))
        read[name] = read_argument(name, given[name], parameters[name].annotation, later)
    return read


#: What comes after what: a bare `17:00` there is the next one after it.
AFTER = {'end': 'start', 'before': 'after'}


def start_of(read: dict, name: str | None, here: Here) -> datetime | None:
    """The instant that an argument which was read names; None where it names none."""
    value = read.get(name)
    if isinstance(value, timedelta):
        return here.now + value
    return value if isinstance(value, datetime) else None


def refuse_unknown(operation: Operation, names: Iterable[str]) -> None:
    for name in names:
        if name not in operation.parameters:
            raise Invalid(f"{operation.words} has no argument '{name}'"
                          f'{nearest(name, operation.parameters)}')


def read_argument(name: str, value, kind, here: Here):
    """One argument of a call, by the type that the operation gives it.

    Raises:
      Invalid: it is malformed; the sentence names the argument.
    """
    try:
        return READERS[kind](value, here)
    except (ValueError, TypeError) as error:
        raise Invalid(f'{name}: {error}') from None


def read_str(value, here=None, most: int = 255) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{shown(value)} is not text')
    if len(value) > most:
        raise ValueError(f'at most {most} characters, not {len(value)}')
    if found := unseen(value):
        raise ValueError(f'the character {found} is not allowed, as nobody would see it; '
                         'leave it out')
    return value


def unseen(text: str) -> str:
    """The name of a text's first character that nobody sees or that is none yet; '' without one."""
    import unicodedata
    found = UNSEEN.search(text)
    if not found and text.isascii():
        return ''
    letters = found[0] if found else text
    bad = next((each for each in letters if found or unicodedata.category(each) == 'Cn'), '')
    return f"U+{ord(bad):04X} {unicodedata.name(bad, '')}".strip() if bad else ''


def read_name(value, here=None) -> str:
    if re.search(r'[\n\t]', text := read_str(value)):
        raise ValueError('a name is one line')
    return text.strip()


def read_label(value, here=None) -> str:
    if re.fullmatch(r'[A-Za-z0-9._-]{1,64}', text := read_str(value)) and text not in NO_LABELS:
        return text
    raise ValueError(f"{shown(text)} is not a name of 1 to 64 letters, digits, '.', '_', '-' "
                     f"(nor {', '.join(NO_LABELS)})")


def read_new_label(value, here=None) -> str:
    if (label := read_label(value)).startswith('-'):
        raise ValueError(f'{shown(label)} begins with -, as options do; begin with a letter or '
                         'a digit')
    return label


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
    if isinstance(value, float) and value.is_integer():  # JSON knows one kind of number
        value = int(value)
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


def read_cursor(value, here: Here) -> str:
    """An id, or SECONDS-ID: the start and the id of a line."""
    start, _, id = str(value).replace('/', '-').rpartition('-')
    if type(value) is bool or not re.fullmatch('[0-9]{1,18}', id):
        raise ValueError(f'{shown(value)} is not a whole number, nor the start and id of a line '
                         f'such as '
                         '2026-12-01T12:00Z/7')
    if not start or re.fullmatch('[0-9]{1,11}', start):
        return '-'.join(filter(None, (start, id)))
    return f'{int(parse_time(str(value).rpartition("/")[0], here.zone, here.now).timestamp())}-{id}'


def read_figure(value, here=None) -> int:
    if not 0 <= (number := read_int(value)) <= 10**12:
        raise ValueError(f'{number} is not between 0 and 10^12')
    return number


def read_most(value, here=None) -> int:
    if value == 'unlimited':
        return UNLIMITED
    try:
        return read_figure(value)
    except ValueError as error:
        raise ValueError(f"{error}, nor 'unlimited'") from None


def read_span(value, here=None) -> timedelta:
    return value if isinstance(value, timedelta) else parse_duration(read_str(value))


def read_when(value, here: Here):
    if isinstance(value, timedelta) or isinstance(value, datetime) and value.tzinfo:
        return value
    if isinstance(value, datetime):
        return value.replace(tzinfo=here.zone)
    text = read_str(value).strip()
    if text[:1] in ('+', 'P') or DURATION.fullmatch(text) and text:
        return parse_duration(text)
    return parse_time(text, here.zone, here.now, here.after)


def read_day(value, here: Here):
    text = ' '.join(value.split()) if isinstance(value, str) else ''
    iso = text.replace('/', '-')
    if re.fullmatch('[0-9]{4}-[0-9]{2}-[0-9]{2}', iso):
        parse_time(iso, here.zone, here.now)
        return date.fromisoformat(iso)
    days = dates_of(text.lower(), here.now.astimezone(here.zone).date()) if text else []
    return days[0] if days else value if type(value) is date else read_when(value, here)


def read_names(value, here=None) -> list[str]:
    items = value.split(',') if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or len(items) > 100:
        raise ValueError(f'{shown(value)} is not a list of at most 100 names')
    return [name for name in map(read_name, items) if name]


def read_pairs(value, here=None) -> dict[str, str]:
    """Nova's metadata: at most 128 pairs, names and values of up to 255 characters."""
    pairs = value
    if isinstance(value, str):
        pairs = dict(pair.split('=', 1) if '=' in pair else (pair, None)
                     for pair in value.split(',') if pair)
    if (not isinstance(pairs, dict) or len(pairs) > 128
        or not all(isinstance(each, str) for each in pairs.values())):
        raise ValueError(f'{shown(value)} is not k=v,k=v with at most 128 pairs')
    for name in pairs:
        if not re.fullmatch('[a-zA-Z0-9_:. -]{1,255}', name):
            raise ValueError(f'{shown(name)} is not a name of 1 to 255 letters, digits, spaces, - '
                             f'_ : .')
    return {name: read_str(each) for name, each in pairs.items()}


def read_classes(value, here=None) -> dict[str, int]:
    """Names as Placement has them, each with a figure; `unlimited` is UNLIMITED."""
    classes = value
    if isinstance(value, str):
        classes = dict(pair.split('=', 1) if '=' in pair else (pair, None)
                       for pair in value.split(',') if pair)
    if not isinstance(classes, dict) or len(classes) > 50:
        raise ValueError(f'{shown(value)} is not such as CUSTOM_GPU=2, with at most 50 classes')
    for name in classes:
        if not re.fullmatch('[A-Z0-9_]{1,255}', name) or name in PLAIN:
            raise ValueError(f'{shown(name)} is not a resource class such as CUSTOM_GPU; vcpus and '
                             f'ram count anyway')
    return {name: read_most(most) for name, most in classes.items()}


def read_hosts(value, here=None) -> list[str]:
    """Names of hosts, those in brackets spelled out: m[01-03,7] is m01, m02, m03 and m7."""
    words = (re.split(r',(?![^\[]*\])', read_str(value, most=2000)) if isinstance(value, str)
             else read_names(value))
    spelled = (host for word in words if word for host in hosts_in(word.strip()))
    hosts = list(dict.fromkeys(itertools.islice(spelled, MOST_PARTS + 1)))
    if (not 0 < len(hosts) <= MOST_PARTS
        or any(not re.fullmatch('[A-Za-z0-9._-]{1,255}', host) for host in hosts)):
        raise ValueError(f'{shown(value)} is not such as m01,m02 or m[01-05], with at most '
                         f'{MOST_PARTS} hosts')
    return hosts


def hosts_in(word: str, brackets: int = 3) -> Iterator[str]:
    """The hosts that a word with some brackets stands for, one by one."""
    head, bracket, rest = word.partition('[')
    inside, closed, tail = rest.partition(']')
    if not (bracket and closed and brackets):
        yield word
        return
    for span in inside.split(','):
        first, _, last = span.partition('-')
        if not re.fullmatch('[0-9]{1,9}(-[0-9]{1,9})?', span) or int(last or first) < int(first):
            raise ValueError(f'{shown(span)} is no range such as 01-05')
        for number in range(int(first), int(last or first) + 1):
            yield from hosts_in(f'{head}{number:0{len(first)}}{tail}', brackets - 1)


def read_parts(value, here=None) -> list[dict]:
    """The parts of a request as objects; what they don't say is as in all of the request."""
    parts = value.split(',') if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not 0 < len(parts) <= MOST_PARTS:
        raise ValueError(f'{shown(value)} is not a list of 1 to {MOST_PARTS} parts such as '
                         f'gpu:2,cpu:20')
    return [read_part(part.split(':') if isinstance(part, str) else part, here) for part in parts]


def read_part(part, here) -> dict:
    if isinstance(part, list):
        if not 1 <= len(part) <= len(PART_WORDS):
            raise ValueError(f"{shown(':'.join(part))} is not RESOURCE:VMS, with :FLAVOR and "
                             f":IMAGE behind it")
        part = {name: word for name, word in zip(PART_WORDS, part) if word}
    if not isinstance(part, dict):
        raise ValueError(f'{shown(part)} is not such as gpu:2, nor an object')
    for name in part:
        if name not in PART_FIELDS:
            raise ValueError(f"a part has no '{name}'{nearest(str(name), PART_FIELDS)}")
    return {name: read_argument(name, each, PART_FIELDS[name], here) for name, each in part.items()
            if each is not None}


def read_zone_name(value, here=None) -> str:
    return read_zone(name).key if (name := read_name(value)) else ''


def read_clash(value, here=None) -> str:
    word, equals, length = read_name(value).partition('=')
    if word in ('refuse', 'skip') and not equals:
        return word
    if word != 'shift':
        raise ValueError(f"{shown(value)} is none of refuse, skip, "
                         f"shift=DURATION{nearest(word, CLASHES)}")
    return f'shift={format_duration(parse_duration(length).total_seconds())}'


def read_ics(value, here=None) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{shown(value)} is not iCalendar text')
    return value


def read_url(value, here=None) -> str:
    if not re.fullmatch('(https?|webcals?)://[!-~]+', url := read_str(value, most=2000)):
        raise ValueError('an http(s) address is needed, such as https://example.org/eva.ics')
    return re.sub('^webcal', 'http', url)


def read_source(value, here=None) -> str:
    return read_url(value) if re.match(r'[a-z]+://\S+$', read_ics(value)) else value


def read_rows(value, here=None) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError('a list of reservations is needed, each an object with fields as in `add`')
    if not all(type(row.get('line', 0)) is int for row in value):
        raise ValueError('the line of a reservation is a whole number')
    if not 0 < len(value) <= 100_000:
        raise ValueError(f'1 to 100000 reservations at a time, not {len(value)}')
    return value


MOST_PARTS = 100
#: Placement's classes that vcpus and ram are, and disks, which are not counted.
PLAIN = ('VCPU', 'MEMORY_MB', 'DISK_GB')
PART_WORDS = ('resource', 'vms', 'flavor', 'image')
#: What may be otherwise in a part than in the rest of a request.
PART_FIELDS = {'resource': Place, 'vms': Count, 'flavor': Name, 'image': Name, 'network': Name,
               'host': Name,
               'cell': Name, 'cloud': Name, 'region': Name, 'aggregate': Name}

READERS = {
    str: read_str, int: read_int, bool: read_bool, Label: read_label, NewLabel: read_new_label,
    Place: read_place, Name: read_name,
    Text: read_text, File: read_file, Count: read_count, Page: read_page,
    Cursor: read_cursor, Figure: read_figure, Most: read_most,
    Span: read_span,
    When: read_when, Day: read_day, Names: read_names, Pairs: read_pairs,
    Classes: read_classes, Hosts: read_hosts, Parts: read_parts, Rows: read_rows,
    Zone: read_zone_name,
    Clash: read_clash,
    Repeat: lambda value, here=None: read_repeat(read_str(value, most=500)), Ics: read_ics,
    Source: read_source,
    Url: read_url}


#: The fields that hold instants, wherever they appear.
INSTANTS = frozenset(
    'added at begun booked_until cancelled changed decide_before deleted end ends last_used '
    'next_start planned polled ready revoked start until'.split())


def to_plain(value):
    """An answer as JSON has it: instants in ISO 8601 and UTC, lengths in ISO 8601."""
    if isinstance(value, dict):
        return {name: to_plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    if isinstance(value, Typed):  # only on the way to a server: answers hold plain instants
        return f'{value.wall.isoformat()}[{value.zone.key}]'
    if isinstance(value, date) and not isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, datetime):
        return value.isoformat(timespec='milliseconds' if value.microsecond else 'seconds')
    return plain_length(value) if isinstance(value, timedelta) else value


def plain_length(length: timedelta) -> str:
    """A length in ISO 8601, with the days that were typed as days."""
    days, seconds = divmod(getattr(length, 'nominal', 0), 86400)[0], int(length.total_seconds())
    return f'P{days}DT{seconds - 86400 * days}S' if days else f'PT{seconds}S'


def from_plain(value):
    """What to_plain was given: the client's answers are equal to the service's."""
    if isinstance(value, dict):
        return {name: each if name == 'metadata' else datetime.fromisoformat(each)
                if name in INSTANTS and isinstance(each, str) else from_plain(each)
                for name, each in value.items()}
    return [from_plain(each) for each in value] if isinstance(value, list) else value


# Answers #####################################################################
#
# What operations answer, each kind declared once. The service makes plain dicts of these fields,
# clients are given them as the objects below, and /openapi.json has its schemas from here. A test
# looks at every answer that the tests meet.

State = NewType('State', str)    # of an occurrence
Lasts = NewType('Lasts', str)  # a length in words, such as 1d2h30m
Secret = NewType('Secret', str)  # what is shown once and kept nowhere


class Answer(dict):
    """Fields that are read as a['label'] and as a.label; the annotations of a kind say which."""
    more = None  # the type of further fields, whose names are known to nobody before

    def __init_subclass__(cls, more=None, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.more = more or cls.more

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no field '{name}' here") from None


class ReservationAnswer(Answer):
    """An occurrence of a reservation: what was asked for, when it is, and in which state."""
    id: int
    label: Label
    user: str
    project: str
    resource: str
    cell: str
    cloud: str
    region: str
    aggregate: str
    vms: int
    flavor: str
    image: str
    network: str
    key: str
    security_groups: list[str]
    metadata: dict[str, str]
    server: str
    at_end: str
    notify: list[str]
    vcpus: int
    ram: int
    classes: dict[str, int]
    lead: int
    description: str
    personal: bool
    repeat: str
    tz: str
    start: datetime
    end: datetime
    cancelled: datetime | None
    added: datetime
    changed: datetime | None
    up: int
    fault: str | None
    request: str
    host: str
    state: State
    change: NotRequired[dict]


class OutcomeAnswer(Answer):
    """What became of one occurrence of a series."""
    start: datetime
    end: datetime
    vms: int
    outcome: str
    why: NotRequired[str]


class BookedAnswer(ReservationAnswer):
    """A reservation that was made or changed; of a series, what became of each occurrence."""
    booked_until: NotRequired[datetime | None]
    occurrences: NotRequired[list[OutcomeAnswer]]
    warnings: NotRequired[list[str]]


class GroupAnswer(Answer):
    """Several reservations that were made together, or not at all."""
    label: Label
    parts: list[BookedAnswer]


class CancelledAnswer(ReservationAnswer):
    """A reservation that was cancelled, and what becomes of its VMs."""
    ends_with: NotRequired[str]
    warnings: NotRequired[list[str]]


class ServerAnswer(Answer):
    """A VM of a reservation: when it was planned, begun, ready and deleted, and what went wrong."""
    n: int
    name: str
    state: str
    addresses: list[str]
    planned: datetime
    begun: datetime | None
    ready: datetime | None
    deleted: datetime | None
    snapshot: str
    tries: int
    fault: str
    account: str
    uid: str | None


class KeptAnswer(Answer):
    """A VM that was stopped or shelved at the end of its reservation and stays."""
    id: int
    name: str
    label: Label
    project: str
    user: str
    state: str
    addresses: list[str]
    end: datetime
    account: str
    uid: str | None


class ComingAnswer(Answer):
    """An occurrence of a series that is not over."""
    start: datetime
    end: datetime
    vms: int
    resource: str
    state: State


class DetailAnswer(ReservationAnswer):
    """All of a reservation, with its VMs, and what comes of a series."""
    user_data: str
    servers: list[ServerAnswer]
    on_conflict: NotRequired[str]
    booked_until: NotRequired[datetime | None]
    occurrences: NotRequired[list[ComingAnswer]]


class DetailGroupAnswer(Answer):
    """All of several reservations that were made together."""
    label: Label
    parts: list[DetailAnswer]


class DurationAnswer(Answer):
    """How long a reservation is."""
    label: Label
    duration: Lasts
    seconds: int


class DurationGroupAnswer(Answer):
    """How long the parts of a group are."""
    label: Label
    parts: list[DurationAnswer]


class RefusedLineAnswer(Answer):
    """A line of many that was refused, and why."""
    line: int
    label: Any
    error: str


class LoadedAnswer(Answer):
    """What became of many reservations."""
    taken: list[BookedAnswer | GroupAnswer]
    refused: list[RefusedLineAnswer]


class SlotAnswer(Answer):
    """A time window that is free for so many VMs."""
    start: datetime
    until: datetime
    duration: Lasts
    vms: int


class UsageAnswer(Answer, more=int):
    """How much of a resource is used in a time window; further fields are resource classes."""
    start: datetime
    end: datetime
    vms: int
    vcpus: int
    ram: int
    free_vms: int | None


class LimitAnswer(Answer):
    """What a project or a user may reserve at most."""
    id: int
    project: str
    user: str
    resource: str
    most_vms: int | None
    longest: Lasts | None
    ahead: Lasts | None
    least_notice: Lasts | None
    vcpu_hours: int | None
    waiting: int | None
    exempt: Lasts
    added: datetime


class ResourceAnswer(Answer):
    """A resource: its location and its capacity, without a number where that is unlimited."""
    id: int
    name: str
    cell: str
    cloud: str
    region: str
    aggregate: str
    vms: int | None
    vcpus: int | None
    ram: int | None
    classes: dict[str, int]
    mode: str
    hold: int
    approval: int
    no_show: int
    hosts: list[str]
    added: datetime


class ResourceNowAnswer(ResourceAnswer):
    """A resource, and how much of it is used now."""
    held_now: dict[str, int]


class ResourceChangedAnswer(ResourceAnswer):
    """A resource that was changed, and what no longer fits."""
    no_longer_fit: list[ReservationAnswer]


class DifferenceAnswer(Answer):
    """A field of a resource that a cloud has otherwise."""
    resource: str
    what: str
    before: Any
    after: Any


class AffectedAnswer(Answer):
    """An occurrence that no longer fits after a capacity change, and what became of it."""
    label: Label
    user: str
    project: str
    vms: int
    start: datetime
    end: datetime
    outcome: str


class CapacityChangeAnswer(Answer):
    """A capacity change or a maintenance that was made, and whom it affects."""
    id: int
    resource: str
    start: datetime
    end: datetime
    reason: str
    hit: list[AffectedAnswer]


class MaintenanceAnswer(Answer):
    """A capacity change or a maintenance."""
    id: int
    resource: str
    start: datetime
    end: datetime
    vms: int | None
    vcpus: int | None
    ram: int | None
    classes: dict[str, int]
    reason: str


class CalledOffAnswer(Answer):
    """A capacity change or a maintenance that was called off."""
    id: int
    reason: str


class CheckAnswer(Answer):
    """How many steps of usage were compared, and in how many they differed."""
    steps: int
    differences: int


class ClaimAnswer(Answer):
    """Whether a server may boot on a resource, why, and on which hosts; on any without a list."""
    resource: str
    passes: bool
    why: str
    hosts: list[str] | None


class EventOutcomeAnswer(Answer):
    """What became of an event of a calendar."""
    uid: str
    summary: str
    outcome: str
    why: NotRequired[str]
    label: NotRequired[Label]
    start: NotRequired[datetime]
    vms: NotRequired[int]
    flavor: NotRequired[str]
    count: NotRequired[int]
    occurrences: NotRequired[list[OutcomeAnswer]]


class ImportAnswer(Answer):
    """What became of the events of a calendar, and how many ask for nothing."""
    events: list[EventOutcomeAnswer]
    ignored: int
    held: NotRequired[str]


class CalendarAnswer(Answer):
    """A feed that shows reservations, or a subscription that makes them."""
    id: int
    kind: str
    user: str
    project: str
    shows: NotRequired[str | None]
    added: NotRequired[datetime]
    revoked: NotRequired[datetime]
    polled: NotRequired[datetime | None]
    fault: NotRequired[str]
    held: NotRequired[str]


class FeedAnswer(Answer):
    """The address of a feed; of a dry run, whose it would be."""
    feed: NotRequired[Secret]
    user: NotRequired[str]
    project: NotRequired[str]


class EventAnswer(Answer):
    """A line of the event log."""
    id: int
    at: datetime
    actor: str
    code: str
    label: Label | None
    project: str | None
    sentence: str


class LatenessAnswer(Answer):
    """How late the VMs of a cloud were, in seconds."""
    cloud: str
    servers: int
    begun_median: float | None
    begun_95: float | None
    begun_worst: float | None
    ready_median: float | None
    ready_95: float | None
    ready_worst: float | None
    tried_again: int


class FailedAnswer(Answer):
    """A VM that did not start."""
    cloud: str
    label: Label
    name: str
    tries: int
    planned: datetime
    fault: str


class PunctualityAnswer(Answer):
    """How late VMs were, and which failed."""
    clouds: list[LatenessAnswer]
    failed: list[FailedAnswer]


class ReportAnswer(Answer):
    """The sums of a project, a user or a resource."""
    project: NotRequired[str]
    user: NotRequired[str]
    resource: NotRequired[str]
    reserved_hours: float
    used_hours: float
    unused_hours: float
    refused: int
    late_worst: float


class TokenAnswer(Answer):
    """Whose a token is and what for; not the token itself, of which only a hash is kept."""
    id: int
    user: str
    project: str
    role: str
    purpose: str
    scopes: list[str]
    resource: str | None
    added: datetime
    ends: datetime | None
    last_used: datetime | None
    revoked: datetime | None


class NewTokenAnswer(Answer):
    """A token that was made; of a dry run, whose it would be."""
    token: NotRequired[Secret]
    user: NotRequired[str]
    project: NotRequired[str]
    role: NotRequired[str]
    ends: NotRequired[datetime]


class EndedAnswer(Answer):
    """How many tokens of a person have ended."""
    user: str
    tokens: int


class RefusalAnswer(Answer):
    """Why a request was refused, in a sentence; `details` say more to programs."""
    error: str
    kind: str
    details: NotRequired[dict]


class HealthAnswer(Answer):
    """Whether the store can be read, and seconds since VMs were looked after."""
    status: NotRequired[str]
    last_pass: NotRequired[float]
    error: NotRequired[str]


class ReadyAnswer(Answer, more=dict):
    """Whether requests can be answered; further fields are the parts that were looked at."""
    status: str


#: What a field means that is no argument, or means more than what may be typed there.
MEANS = WORDS | {
    'account': 'the entry of clouds.yaml under which the VM was made', 'addresses': 'IP addresses',
    'added': 'when it was made', 'at': 'when it happened', 'actor': 'who did it',
    'begun': 'when the cloud was asked for it', 'booked_until': 'until when a series is reserved',
    'cancelled': 'when it was cancelled', 'change': 'what of it waits for an approval',
    'changed': 'when somebody changed it last', 'code': 'what kind of event it is',
    'deleted': 'when the VM was gone', 'details': 'what the sentence says, for programs',
    'end': 'when it ends; that instant is not part of it', 'ends': 'when the token ends',
    'ends_with': 'what becomes of its VMs', 'error': 'why, in a sentence',
    'fault': 'what went wrong last', 'free_vms': 'how many VMs are free; without one, any number',
    'held_now': 'how much is reserved now, by resource class', 'hit': 'whom it affects',
    'id': 'its number, which never changes', 'ignored': 'how many events ask for nothing',
    'kind': 'which kind it is of', 'last_pass': 'seconds since VMs were started and ended',
    'last_used': 'when the token was used last', 'lead': 'seconds before the start',
    'n': 'which of the VMs of a reservation it is', 'outcome': 'what became of it',
    'passes': 'whether the server may boot', 'planned': 'when it was to begin',
    'polled': 'when the calendar was read last', 'ready': 'when the VM was active',
    'refused': 'what was refused', 'request': 'the group that it is a part of',
    'revoked': 'since when it is worth nothing', 'seconds': 'its length in seconds',
    'server': 'an existing server that it starts and stops', 'shows': 'what the calendar is of',
    'snapshot': 'the image that was made of the VM', 'start': 'when it starts',
    'state': 'what it is doing now', 'taken': 'what was reserved', 'token': 'the token itself',
    'tries': 'how often the cloud was asked for it', 'uid': 'its id at the cloud or in a calendar',
    'until': 'until when it is free', 'up': 'how many of its VMs are active',
    'warnings': 'what may be otherwise than meant', 'why': 'for what reason'}


class Field(NamedTuple):
    """A field of an answer: the type of its value, and whether it is always there."""
    kind: Any
    always: bool


@functools.cache
def declared(answer: type[Answer]) -> dict[str, Field]:
    """The fields that an answer declares."""
    hints = get_type_hints(answer, include_extras=True)
    return {name: Field(get_args(kind)[0], False) if get_origin(kind) is NotRequired
            else Field(kind, True) for name, kind in hints.items()}


def choices_of(kind) -> tuple:
    """The types of which a value has one."""
    return get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)


def as_answer(value, kind):
    """A value of an answer as JSON has it, as what its type says: the reverse of `to_plain`."""
    kinds = choices_of(kind)
    if isinstance(value, list):
        items = [get_args(each)[0] for each in kinds if get_origin(each) is list]
        return [as_answer(each, *(items or [Any])) for each in value]
    if isinstance(value, dict):
        return as_object(value, kinds)
    return datetime.fromisoformat(value) if value is not None and datetime in kinds else value


def as_object(value: dict, kinds: tuple):
    """The same of an object: the first kind whose fields it has; of another version, as it is."""
    for each in kinds:
        if get_origin(each) is dict:
            return {name: as_answer(one, get_args(each)[1]) for name, one in value.items()}
        fields = declared(each) if is_answer(each) else {}
        if fields and all(name in value for name, field in fields.items() if field.always):
            more = Field(each.more or Any, False)
            return each({name: as_answer(one, fields.get(name, more).kind)
                         for name, one in value.items()})
    return from_plain(value)


def is_answer(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, Answer)


# Store #######################################################################
#
# peewee's models say what is on disk. Everything that is read or written at every request goes
# through a few functions over plain SQL (building peewee's SQL costs ten times what SQLite needs
# to run it). There is one idiom for writing: `with transaction():`, IMMEDIATE, so that what is
# read in it can't change before it ends. Nothing remote is ever called inside. Dry runs, and the
# search for what would fit instead of what is refused, are `rehearsing()`: they hold up nobody.

PATIENT = 30  # seconds that a writer waits for others
PIECE = 0.02  # seconds after which what is long lets others write between
OURS = 0x636d7265  # the application id of our databases: 'cmre'
SIDES = ('', '-wal', '-shm')  # the files of an open database: itself, its log, the log's index


class LogState(NamedTuple):
    """How far SQLite's log is, as its index says."""
    changes: int  # how many transactions ended since the first process opened the database
    salt: int     # another one each time that the log is begun anew
    frames: int   # how many pages it has
    copied: int   # how many of them the database file has too
    size: int     # bytes that the log has at least
    calm: bool    # nobody copies now

    def follows(self, changes: int, salt: int, frames: int) -> bool:
        """Whether it can be what became of an earlier state; an index made anew counts from 0."""
        return self.changes >= changes or self.salt == salt and self.frames >= frames

    @property
    def is_between(self) -> bool:
        """Whether the database file has some of the log: that can be anything of a page."""
        return 0 < self.copied < self.frames

    def has_copied(self, before: LogState) -> bool:
        """Whether pages may have been copied since an earlier state."""
        new = self.changes - before.changes  # with one transaction, the log was only begun anew
        same = before.copied == before.frames and not self.copied
        return not same or new > 1 or new == 1 and not self.frames


def read_log(index: int) -> LogState | None:
    """What the open index of a log says (https://sqlite.org/walformat.html)."""
    return log_state(os.pread(index, 136, 0))


@functools.lru_cache(16)
def log_state(data: bytes) -> LogState | None:
    """What the first bytes of an index say; None while they change."""
    if len(data) < 136 or data[:48] != data[48:96]:
        return None
    changes, page, frames = struct.unpack_from('=I2xHI', data, 8)
    salt, = struct.unpack_from('=Q', data, 32)
    copied, tried = struct.unpack_from('=I28xI', data, 96)
    size = 32 + frames * (24 + (65536 if page == 1 else page)) if frames else 0
    return LogState(changes, salt, frames, copied, size, copied == tried <= frames)


def is_calm(state: LogState | None, again: LogState | None) -> bool:
    """Whether nothing was copied from the log between two looks at its index."""
    if not state or not again or not state.calm or not again.calm:
        return False
    return (state.salt, state.copied) == (again.salt, again.copied)


class Copied(NamedTuple):
    """A database file as SQLite left it when it had copied so much of its log into it."""
    changes: int
    salt: int
    copied: int
    size: int
    mtime: int   # ns
    number: int  # of the last write that is in it
    digest: int  # of all that is in it; 0: it is large
    lost: bool = False  # it was found to be overwritten since

    def is_of(self, state: LogState | Copied) -> bool:
        """Whether no more was copied, nor the log begun anew."""
        return (self.salt, self.copied) == (state.salt, state.copied)

    def is_like(self, found: os.stat_result) -> bool:
        """Whether nobody has written to the file since."""
        return (self.size, self.mtime) == (found.st_size, found.st_mtime_ns)

    def holds_what(self, now: Copied) -> bool:
        """Whether a file that was written to holds what it held."""
        return (self.size, self.digest) == (now.size, now.digest) and self.digest > 0

    def may_become(self, now: Copied, state: LogState, least: int) -> bool:
        """Whether SQLite may have made another file of it, which has so many writes."""
        enough = state.is_between or now.number >= max(self.number, least)
        return not self.lost and state.follows(*self[:3]) and enough

    def packed(self) -> bytes:
        """It as bytes, with a check sum."""
        data = struct.pack(COPIED, *self)
        return data + struct.pack('=I', zlib.crc32(data))


COPIED = '=IQIqqqI?'
ACKNOWLEDGED = 64  # where the lock has the number of the last write that was acknowledged


def unpacked(data: bytes) -> Copied | None:
    """What was packed; None if nothing was, or somebody is writing it."""
    size = struct.calcsize(COPIED)
    found = Copied(*struct.unpack_from(COPIED, data)) if len(data) > size else None
    return found if found and data.startswith(found.packed()) else None


class StoreFile:
    """The files of the open database, known by device and inode, and the lock beside them.

    What is written to a file that was removed or replaced is lost, and SQLite does not notice. Nor
    does it notice that another program writes into the file. But SQLite itself changes the file
    only when it copies its log into it, and the log's index says how much was copied. So a file
    that changed while nothing was copied was overwritten. All processes share, in the lock, what
    the file was like last.
    """

    def __init__(self):
        self.path, self.identity, self.store = '', (), ''  # the last is the id that is in the file
        self.lock = self.guard = None  # the guard is a connection that keeps log and index in place
        self.file = self.index = None  # open as long as the guard: closing drops SQLite's locks
        self.log = LogState(0, 0, 0, 0, 0, True)
        self.known: Copied | None = None  # as the file was last when it was right
        self.damage = ''  # what a statement or a check met, until a check meets nothing
        self.lost = ''    # the sentence that was logged of a loss
        self.troubles = 0  # how often something was wrong, or right again
        self.failed = '', 0.0  # why a write failed and when, until one succeeds

    def hold(self, path: str) -> None:
        """Says to other processes that the file is in use, and connects the guard."""
        self.path = os.path.abspath(path)
        self.lock = lock_store(path, alone=False)
        self.file = os.open(path, os.O_RDONLY)
        if os.path.exists(path + '-shm'):  # before SQLite reads what others know to be lost
            self.index = os.open(path + '-shm', os.O_RDONLY)
            self.compare(self.log)
            os.close(self.index)
            self.index = None
        self.guard = connect(path)

    def settle(self) -> None:
        """Copies the log into the file, so that who copies the file alone has everything."""
        with suppress(Unavailable, sqlite3.Error):
            self.look()
            if self.guard and not self.lost:
                self.guard.execute('PRAGMA wal_checkpoint(PASSIVE)').fetchone()

    def leave(self) -> None:
        """Closes the guard; where nobody else has the file open, SQLite makes all one file."""
        with suppress(Unavailable, *STORE_ERRORS):
            self.look()
            if self.guard and not self.lost:
                db.close()
                self.guard.close()

    def release(self) -> None:
        """Forgets the files."""
        if self.guard:
            self.guard.close()
        for each in (self.index, self.file, self.lock):
            if each is not None:
                os.close(each)
        self.__init__()

    def recognise(self) -> None:
        """From now on only these files are ours."""
        self.guard.execute('PRAGMA journal_mode = wal').fetchone()
        self.guard.execute('SELECT count(*) FROM sqlite_master').fetchone()  # opens log and index
        self.index = os.open(self.path + '-shm', os.O_RDONLY)
        if (state := read_log(self.index)) and not state.calm:  # who copied last was killed
            self.guard.execute('PRAGMA wal_checkpoint(PASSIVE)').fetchone()
        self.identity = identity_of(stats_of(self.path))
        self.look()

    def check(self) -> None:
        """Raises Unavailable unless the path leads to the open files, as SQLite left them."""
        self.look()
        if self.lost:  # until the cause is gone
            self.renew()

    def confirm(self) -> None:
        """The same before a transaction ends, which may have read what is right again now."""
        self.look()
        if self.lost:
            raise Unavailable(self.lost)

    def look(self) -> None:
        """Raises Unavailable if the files are others than were opened, or were overwritten."""
        if not self.identity:
            return
        before, known = self.log, self.known
        state, stats = read_log(self.index), stats_of(self.path)
        if (found := identity_of(stats)) != self.identity:
            raise Unavailable(self.loss(found))
        if state:
            self.refuse_shorter(before, state, stats[1].st_size)
            self.log = state
        if not known or not known.is_like(stats[0]) or state and not known.is_of(state):
            with suppress(FileNotFoundError):  # the next look will tell
                self.compare(before)

    def refuse_shorter(self, before: LogState, state: LogState, size: int) -> None:
        """Raises Unavailable if the log or its index went back."""
        if not state.follows(*before[:3]):
            raise Unavailable(self.told_of('-shm', OVERWRITTEN, RESTART))
        if size < state.size and read_log(self.index) == state:  # else it was begun anew just now
            raise Unavailable(self.told_of('-wal', OVERWRITTEN, RESTART))

    def compare(self, before: LogState) -> None:
        """Raises Unavailable if the file changed, and not by what was copied into it."""
        written, last = self.written(), unpacked(os.pread(self.lock, ACKNOWLEDGED, 0))
        state, found = read_log(self.index), os.stat(self.path)
        if not state:
            return
        now = self.left_by(state, found)
        same = last and (last.is_of(state) or last.is_of(before) and not state.has_copied(before))
        right = not last or last.is_like(found) or (
            last.holds_what(now) if same else
            last.may_become(now, state, written - ends_in_log(self.path, state)))
        if not is_calm(state, read_log(self.index)):
            return  # it is being copied: the next look will tell
        if not right:
            if same:
                self.note(Copied(*now[:3], *last[3:7], lost=True))
            raise Unavailable(self.told_of('', OVERWRITTEN, PUT_BACK))
        if self.guard and now.is_like(os.stat(self.path)):
            self.note(now)
            self.known = now

    def left_by(self, state: LogState, found: os.stat_result) -> Copied:
        """What the file is like now; it is read if it has changed."""
        known, size = self.known, found.st_size
        if known and known.is_like(found):
            contents = known[5:7]
        else:
            before = known.number if known and state.is_between else None
            contents = contents_of(self.path, self.file, size, before)
        return Copied(*state[:2], state.copied, size, found.st_mtime_ns, *contents)

    def acknowledged(self) -> int:
        """The number of the last write that was acknowledged, by any process."""
        found = os.pread(self.lock, 8, ACKNOWLEDGED)
        return struct.unpack('=Q', found)[0] if len(found) == 8 else 0

    def written(self) -> int:
        """The number of the last write that anybody knows of."""
        number = self.acknowledged()
        if self.guard:
            with suppress(sqlite3.Error):  # the file may hold anything now
                number = max(number, *self.guard.execute(LAST_WRITE).fetchone() or (0,))
        return number

    def acknowledge(self, number: int) -> None:
        """Lets all processes know of a write, unless it went to files that are lost since."""
        self.failed = '', 0.0
        if self.identity:
            self.look()
            number = max(number, self.acknowledged())
            with suppress(OSError):  # a full disk is told of elsewhere
                os.pwrite(self.lock, struct.pack('=Q', number), ACKNOWLEDGED)

    def note(self, copied: Copied) -> None:
        """Tells all processes what the file was like last."""
        with suppress(OSError):
            os.pwrite(self.lock, copied.packed(), 0)

    def renew(self) -> None:
        """Ends a loss: a write lets all connections forget what they have read meanwhile."""
        try:
            write_probe(self.path)
        except sqlite3.Error as error:
            raise in_trouble(error) or Unavailable(self.lost) from None
        self.lost, self.troubles = '', self.troubles + 1

    def loss(self, found: tuple) -> str:
        """What became of the files, as people read it; logged once."""
        side = next(n for n in range(len(SIDES)) if found[n] != self.identity[n])
        what = f"was {'replaced by another file' if found[side] else 'removed'} while cmres used it"
        if side == 1 and not found[1] and not self.lost:  # what the log alone holds is saved
            self.guard.execute('PRAGMA wal_checkpoint(PASSIVE)')
        return self.told_of(SIDES[side], what, RESTART if side else PUT_BACK)

    def told_of(self, side: str, what: str, then: str) -> str:
        """The sentence about a loss; it is logged when it is a new one."""
        name = os.path.basename(self.path) + side
        lost = f"the database file '{name}' {what}: nothing is saved now. {then}"
        if lost != self.lost:
            self.lost, self.troubles = lost, self.troubles + 1
            log.critical('%s', lost)
        return lost


RESTART = 'Stop all processes of cmres and start them again'
PUT_BACK = ('Put the first file back; or stop cmres, restore a backup with `store restore FILE`, '
            'and start it again')
OVERWRITTEN = 'was overwritten by another program while cmres used it, so it is damaged'
MOST_DIGESTED = 16 << 20  # bytes of a database file, which is read whole each time it has changed
store_file = StoreFile()


def stats_of(path: str) -> tuple:
    """What the system says of each of the files of a database; None for one that is not there."""
    return tuple(stat_of(path + side) for side in SIDES)


def stat_of(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def identity_of(stats: tuple) -> tuple:
    """Device and inode of each of some files; None for one that is not there."""
    return tuple(each and (each.st_dev, each.st_ino) for each in stats)


def ends_in_log(path: str, state: LogState) -> int:
    """How many transactions end in that part of a log which the database file has not."""
    if state.copied >= state.frames:
        return 0
    size, ends = (state.size - 32) // state.frames, 0
    with open(path + '-wal', 'rb') as file:
        for n in range(state.copied, state.frames):
            ends += any(os.pread(file.fileno(), 4, 32 + n * size + 4))
    return ends


def contents_of(path: str, file: int, size: int, number: int | None) -> tuple[int, int]:
    """The number of the last write in a database file without its log, and a digest of the file."""
    digest = zlib.crc32(os.pread(file, size + 1, 0)) if size <= MOST_DIGESTED else 0
    if number is not None:
        return number, digest
    try:
        with closing(sqlite3.connect(file_uri(path) + '&immutable=1', uri=True)) as alone:
            found = alone.execute(LAST_WRITE).fetchone()
    except sqlite3.Error:  # it is empty, or damaged
        return -1, digest
    return found[0] if found else 0, digest


def file_uri(path: str) -> str:
    """The name under which SQLite opens a file that must be there: it makes none."""
    return f'file:{quote(os.path.abspath(path))}?mode=rw'


def connect(path: str, timeout: float = PATIENT) -> sqlite3.Connection:
    """A connection of its own to a database file that is there."""
    return sqlite3.connect(
        file_uri(path), timeout, isolation_level=None, uri=True, check_same_thread=False)


def lock_store(path: str, alone: bool) -> int:
    """Takes the lock beside a database: alone to replace or migrate it, else with others.

    It ends with the process or when the file descriptor is closed. Whoever comes first forgets
    what earlier processes knew of the file. Unavailable: others use it, or one replaces it.
    """
    import fcntl
    try:
        file = os.open(f'{path}.lock', os.O_RDWR | os.O_CREAT, mode_of(path))
    except OSError as error:
        raise Unavailable(f"can't open the lock '{path}.lock': {error.strerror}") from None
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
    kind, refusal = (fcntl.LOCK_EX, IN_USE) if alone else (fcntl.LOCK_SH, BEING_REPLACED)
    until = time.monotonic() + (0 if alone else PATIENT)
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(file)
                raise Unavailable(refusal.format(path)) from None
        time.sleep(0.05)


IN_USE = ("other processes use the database '{}': stop `serve`, `scheduler` and other commands of "
          'cmres first')
BEING_REPLACED = "another process migrates or restores the database '{}'; try again in a minute"


def mode_of(path: str) -> int:
    """The permissions of a database, for the files beside it; of none, its owner's alone."""
    try:
        return os.stat(path).st_mode & 0o777
    except OSError:
        return 0o600


class Database(peewee.SqliteDatabase):
    """SQLite whose connections all lead to the same file, and whose errors tell the first cause."""

    def _connect(self):
        store_file.check()
        connection = super()._connect()
        try:
            store_file.check()  # also after it: no thread may write to another file than the others
        except Unavailable:
            connection.close()
            raise
        return connection

    def rollback(self):
        """Undoes a transaction, unless SQLite did so already: on a full disk, say."""
        if self.connection().in_transaction:
            super().rollback()


db = Database(None, lock_type='IMMEDIATE', pragmas={
    'journal_mode': 'wal', 'synchronous': 'full', 'foreign_keys': 1, 'cache_size': -10_000})


class Turns:
    """Whose turn it is to write in this process: SQLite's own handler of the busy is unfair.

    The life cycle comes first: people wait for VMs. Then comes who has written for the shortest
    time, then who waits longest. So nobody who writes much delays others by more than one turn.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.holder, self.depth, self.began = None, 0, 0.0
        self.waiting: list[tuple] = []      # after others or not, whose, what opens, its thread
        self.written: Counter = Counter()   # seconds, by whose; who comes anew begins at `least`
        self.least = 0.0

    def acquire(self, timeout: float = -1, first: bool = False) -> bool:
        """Waits for the turn of this thread, which may have it already; whether it came in time."""
        if self.mine:
            self.depth += 1
            return True
        comes = threading.Lock()
        comes.acquire()
        mine = not first, getattr(WRITER, 'name', ''), comes, threading.get_ident()
        with self.lock:
            self.waiting.append(mine)
            self.hand_on()
        try:
            comes.acquire(timeout=timeout)
        except BaseException:  # a signal ends the program
            if self.came(mine):
                self.release()
            raise
        return self.came(mine)

    def came(self, one: tuple) -> bool:
        """Whether the turn of one came; if not, it waits no longer."""
        with self.lock:
            if late := one in self.waiting:
                self.waiting.remove(one)
        return not late

    def release(self) -> None:
        """Ends what `acquire` has begun."""
        if self.depth:
            self.depth -= 1
            return
        with self.lock:
            self.written[self.name] += time.monotonic() - self.began
            self.holder = None
            self.hand_on()

    def hand_on(self) -> None:
        """Gives the turn to who is next, if nobody has it."""
        if self.holder is not None or not self.waiting:
            return
        after, self.name, comes, self.holder = min(self.waiting, key=self.place)
        self.waiting = [each for each in self.waiting if each[2] is not comes]
        self.least = self.least if not after else max(self.least, self.written[self.name])
        self.written[self.name] = max(self.least, self.written[self.name])
        if len(self.written) > 1000:
            ahead = {name: each for name, each in self.written.items() if each > self.least}
            self.written = Counter(ahead)
        self.began = time.monotonic()
        comes.release()

    @property
    def mine(self) -> bool:
        """Whether this thread has the turn."""
        return self.holder == threading.get_ident()

    def lasts(self) -> float:
        """For how many seconds whoever has the turn has had it."""
        return time.monotonic() - self.began

    def place(self, one: tuple) -> tuple[bool, float]:
        """What decides who of those that wait is next; of equals, who came first."""
        after, name, *_ = one
        return after, max(self.written[name], self.least)


turns = Turns()
WRITER = threading.local()  # its `name` tells for whom this thread acts


@contextmanager
def acting_for(name: str) -> Iterator[None]:
    """What this thread does is done for somebody."""
    WRITER.name = name
    try:
        yield
    finally:
        WRITER.name = ''


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
    mode = peewee.CharField(default='')   # '' or one of MODES
    hold = peewee.IntegerField(default=0)  # seconds
    # seconds that one is held for an admin to approve it; 0: no need
    approval = peewee.IntegerField(default=0)
    # seconds after which one that nobody uses is released; 0: never
    no_show = peewee.IntegerField(default=0)
    # JSON: what it holds of other resource classes of Placement; '': none
    classes = peewee.TextField(default='')
    hosts = peewee.TextField(default='[]')  # JSON: of its aggregate, as `sync` saw them
    # JSON: what each of them holds, where they are reserved by name
    named = peewee.TextField(default='')
    added = peewee.IntegerField()
    removed = peewee.IntegerField(null=True)


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
    # the id of a machine that its owner has already, in place of an image
    server = peewee.CharField()
    at_end = peewee.CharField()  # '' or one of ENDS
    notify = peewee.TextField()  # JSON
    lead = peewee.IntegerField()  # seconds
    description = peewee.TextField()
    repeat = peewee.CharField(default='')        # the RRULE of a series as it was asked for
    tz = peewee.CharField(default='')            # whose wall times it goes by
    series = peewee.TextField(default='')        # JSON: its stretches
    request = peewee.CharField(default='')       # the label of the request of which this is a part
    host = peewee.CharField(default='')          # all of it is reserved, by its name
    # JSON: while it waits for one of several resources, those
    choices = peewee.TextField(default='')
    waiting = peewee.IntegerField(null=True)     # since when it waits for room
    priority = peewee.IntegerField(default=0)
    # seconds that room is held for its owner to accept it
    confirm = peewee.IntegerField(default=0)
    pending = peewee.IntegerField(null=True)     # until when it is held for somebody's word
    personal = peewee.BooleanField(default=False)  # only its user may boot on it through Nova
    on_conflict = peewee.CharField(default='')   # what becomes of an occurrence that has no room
    trusted = peewee.TextField(default='[]')     # JSON: KIND:NAME that an admin gave it
    booked_until = peewee.IntegerField(null=True)  # how far it is in rows, if it goes on after that
    # a digest of that event, to see whether it is another
    origin = peewee.CharField(default='')
    uid = peewee.CharField(null=True)            # of the event of a calendar that it comes from
    subscription = peewee.IntegerField(null=True)  # the calendar that brought it
    added = peewee.IntegerField()
    changed = peewee.IntegerField()
    over = peewee.IntegerField()  # from then on its label is free again
    # by which day and zone table a series was carried on last
    carried = peewee.CharField(null=True)

    class Meta:
        indexes = ((('label', 'project', 'over'), False),)


class Occurrence(Table):
    reservation = peewee.ForeignKeyField(Reservation, index=False)
    # the wall time at which a series has it: its key; '' if it is the only one
    slot = peewee.CharField(default='')
    altered = peewee.BooleanField(default=False)  # it was changed on its own: the series lets it be
    revision = peewee.IntegerField(default=0)  # how often something about it was told
    revised = peewee.IntegerField(default=0)   # when that was last
    resource = peewee.ForeignKeyField(Resource, index=False)
    start = peewee.IntegerField()
    end = peewee.IntegerField()
    held_from = peewee.IntegerField()   # start - lead
    held_until = peewee.IntegerField()  # end, or earlier when it was cancelled
    vms = peewee.IntegerField()
    vcpus = peewee.IntegerField()  # of all its machines
    ram = peewee.IntegerField()    # of all its machines, MiB
    classes = peewee.TextField(default='')  # of all its machines, JSON
    cancelled = peewee.IntegerField(null=True)
    told = peewee.IntegerField(default=0)  # which of SOON, READY, ENDING were announced
    # when the life cycle must look at it next; NULL: never again
    due = peewee.DoubleField(null=True)
    up_told = peewee.IntegerField(null=True)  # so many servers were up when that was last told
    up_check = peewee.DoubleField(null=True)  # when another number is told, if it is one still
    # These two are as its reservation has them, so that indexes know them; triggers keep them so.
    of_project = peewee.CharField(default='', constraints=[peewee.SQL("DEFAULT ''")])
    of_user = peewee.CharField(default='', constraints=[peewee.SQL("DEFAULT ''")])

    class Meta:
        constraints = [peewee.Check('held_from <= start AND start < "end" AND held_until <= "end"')]


#: What lists walk, in order of start: what is live and what is over for good apart, so that what is
#: asked for most is not found among history. Each costs about a page of the journal at every
#: change.
WALKED = {'': (), 'project': ('of_project',), 'user': ('of_user',), 'place': ('resource_id',)}
HALVES = {'live': 'due IS NOT NULL', 'over': 'due IS NULL'}
DAY, MONTH = 86400, 31 * 86400
#: Indexes of occurrences that peewee can't write: by name, on what, and of which rows.
ORDERS = {'series': ('reservation_id, due IS NULL, start', ''), 'due': ('due', 'due IS NOT NULL'),
          'cancelled': ('start', 'cancelled IS NOT NULL'), 'failed': ('start', 'told & 128'),
          'long': ('start', f'"end" - start > {DAY}'),
          'longest': ('start', f'"end" - start > {MONTH}')} | {
    '_'.join(filter(None, (by, half))): (', '.join((*columns, 'start')), rows)
    for by, columns in WALKED.items() for half, rows in HALVES.items()}


class Texts(Table):
    """How many characters of long texts the reservations of a project have; triggers count them."""
    project = peewee.CharField(primary_key=True)
    size = peewee.IntegerField()


class Capacity(Table):
    """A stretch of time in which a resource has another capacity: it holds the difference."""
    resource = peewee.ForeignKeyField(Resource)
    start = peewee.IntegerField()
    end = peewee.IntegerField()
    vms = peewee.IntegerField(null=True)    # NULL in these: as always
    vcpus = peewee.IntegerField(null=True)
    ram = peewee.IntegerField(null=True)
    # what it holds; less than nothing where there is more than always
    held_vms = peewee.IntegerField()
    held_vcpus = peewee.IntegerField()
    held_ram = peewee.IntegerField()
    classes = peewee.TextField(default='')
    held_classes = peewee.TextField(default='')
    reason = peewee.CharField()
    added = peewee.IntegerField()
    removed = peewee.IntegerField(null=True)


class Proposal(Table):
    """A change that takes more of what needs approval; until it has it, all stays as it is."""
    reservation = peewee.ForeignKeyField(Reservation)
    occurrence = peewee.IntegerField()           # the one that it is told for
    alone = peewee.BooleanField()                # it changes no other
    user = peewee.CharField()                    # who asks
    code = peewee.CharField()                    # of the event that tells of the change
    asked = peewee.TextField()                   # JSON: the names of what is to be otherwise
    named = peewee.BooleanField()                # that occurrence was named, not only found
    wish = peewee.TextField()                    # JSON: what the reservation would be
    shown = peewee.TextField()                   # JSON: what of that is told to people
    until = peewee.IntegerField()                # it is dropped then


class ExtraHold(Table):
    """What is held beside occurrences: what a proposal takes more, or VMs that stay stopped."""
    reservation = peewee.ForeignKeyField(Reservation)
    proposal = peewee.ForeignKeyField(Proposal, null=True)  # NULL: for VMs that stay
    resource = peewee.ForeignKeyField(Resource)
    held_from = peewee.IntegerField()
    held_until = peewee.IntegerField()
    vms = peewee.IntegerField()
    vcpus = peewee.IntegerField()
    ram = peewee.IntegerField()
    classes = peewee.TextField()


class Wait(Table):
    """A resource on which one that waits could be, and when to try that again."""
    reservation = peewee.ForeignKeyField(Reservation)
    resource = peewee.ForeignKeyField(Resource, index=False)
    held_from = peewee.IntegerField()
    until = peewee.IntegerField()  # the end of its window
    since = peewee.IntegerField()
    limited = peewee.BooleanField(default=False)  # it is not room that it lacks
    due = peewee.DoubleField()


class Limit(Table):
    """What a user, a project, or each project without a limit of its own may hold."""
    project = peewee.CharField()   # '' and no user: every project
    user = peewee.CharField()
    resource = peewee.ForeignKeyField(Resource, index=False, null=True)  # NULL: all together
    most_vms = peewee.IntegerField(null=True)
    longest = peewee.IntegerField(null=True)       # seconds
    ahead = peewee.IntegerField(null=True)         # seconds
    least_notice = peewee.IntegerField(null=True)  # seconds
    vcpu_hours = peewee.IntegerField(null=True)
    waiting = peewee.IntegerField(null=True)
    exempt = peewee.IntegerField()                 # seconds
    added = peewee.IntegerField()

    class Meta:
        table_name = 'limits'  # LIMIT is a word of SQL


class Step(Table):
    """Of `resource`, this much is held from `at` until the next step of the same track."""
    resource = peewee.ForeignKeyField(Resource, index=False)
    # '' of the three figures; else a resource class, whose figure stands in `vms`
    track = peewee.CharField()
    at = peewee.IntegerField()
    vms = peewee.IntegerField()
    vcpus = peewee.IntegerField()
    ram = peewee.IntegerField()

    class Meta:
        primary_key = peewee.CompositeKey('resource', 'track', 'at')
        without_rowid = True


class Server(Table):
    occurrence = peewee.ForeignKeyField(Occurrence, index=False)
    n = peewee.IntegerField()
    name = peewee.CharField()
    account = peewee.CharField()       # the entry of clouds.yaml that it is made with
    goal = peewee.CharField()          # up, then what becomes of it: one of ENDS
    # planned, then Nova's status in lower case or one of UNDER_WAY, at last FINAL
    state = peewee.CharField()
    # it was there before, and will be after: never made, never deleted
    borrowed = peewee.BooleanField()
    # creates begun so far: part of the mark, so that none is used twice
    tries = peewee.IntegerField()
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
    intended = peewee.DoubleField(null=True)  # when a call whose end is not known was intended
    called = peewee.DoubleField(null=True)  # when the last call for it has ended, at the latest
    due = peewee.DoubleField(null=True)


class Claim(Table):
    """A server that Nova was let boot on a resource; it counts until it is gone."""
    resource = peewee.ForeignKeyField(Resource, index=False)
    # what it boots on; NULL: on what nobody has reserved
    occurrence = peewee.IntegerField(null=True)
    server = peewee.CharField()   # Nova's id
    project = peewee.CharField()  # Nova's ids
    user = peewee.CharField()
    vcpus = peewee.IntegerField()
    ram = peewee.IntegerField()  # MiB
    classes = peewee.TextField(default='')
    at = peewee.DoubleField()
    due = peewee.DoubleField(null=True)  # when it is looked for next; NULL: it is gone
    gone = peewee.DoubleField(null=True)


class Tally(Table):
    """What reports tell of a day (UTC) whose occurrences, servers and claims are forgotten."""
    day = peewee.IntegerField()  # its first second
    project = peewee.CharField()
    user = peewee.CharField()
    resource = peewee.IntegerField()  # its id; 0: of none
    reserved = peewee.DoubleField()   # seconds of VMs, as the two that follow
    used = peewee.DoubleField()
    unused = peewee.DoubleField()
    refused = peewee.IntegerField()   # requests
    late = peewee.DoubleField()       # seconds, of the worst

    class Meta:
        primary_key = peewee.CompositeKey('day', 'project', 'user', 'resource')
        without_rowid = True


class Token(Table):
    user = peewee.CharField()
    project = peewee.CharField()
    role = peewee.CharField()
    hash = peewee.CharField(unique=True)
    added = peewee.IntegerField()
    revoked = peewee.IntegerField(null=True)
    purpose = peewee.CharField(default='')
    ends = peewee.IntegerField(null=True)
    last_used = peewee.IntegerField(null=True)  # to about a minute
    scopes = peewee.CharField(default='')       # with commas between; '': all that its role may
    resource = peewee.ForeignKeyField(Resource, index=False, null=True)  # the only one


class Session(Table):
    """Somebody who has signed in to the page, by the hash of what their cookie says."""
    hash = peewee.CharField(primary_key=True)
    token = peewee.ForeignKeyField(Token)
    until = peewee.IntegerField(index=True)


class OnceDone(Table):
    """A request that names itself by an Idempotency-Key, so that it is done once."""
    user = peewee.CharField()
    project = peewee.CharField()
    key = peewee.CharField()
    digest = peewee.CharField()  # of what was asked
    mark = peewee.CharField()    # of the attempt that did it
    at = peewee.IntegerField(index=True)
    status = peewee.IntegerField()  # 0: its answer is not there
    answer = peewee.TextField()

    class Meta:
        table_name = 'once'
        primary_key = peewee.CompositeKey('user', 'project', 'key')
        without_rowid = True


class Feed(Table):
    """What a secret address shows as a calendar: of a user, of a project or of a resource."""
    user = peewee.CharField()
    project = peewee.CharField()
    whole_project = peewee.BooleanField()
    resource = peewee.ForeignKeyField(Resource, index=False, null=True)
    hash = peewee.CharField(unique=True)
    added = peewee.IntegerField()
    revoked = peewee.IntegerField(null=True)


class Subscription(Table):
    """A person's calendar that is looked at again and again."""
    user = peewee.CharField()
    project = peewee.CharField()
    url = peewee.CharField()       # a secret
    defaults = peewee.TextField()  # JSON: what its events don't say; the resource by its id, or 0
    notify = peewee.TextField()    # JSON
    etag = peewee.CharField(default='')
    modified = peewee.CharField(default='')
    fault = peewee.TextField(default='')
    refused = peewee.TextField(default='{}')  # JSON: by UID, why it could not be booked
    held = peewee.TextField(default='')  # what waits for its owner's word
    confirmed = peewee.BooleanField(default=False)
    tries = peewee.IntegerField(default=0)
    polled = peewee.DoubleField(null=True)
    due = peewee.DoubleField(null=True)  # NULL: it is not looked at any more
    added = peewee.IntegerField()


class Event(Table):
    at = peewee.DoubleField()
    actor = peewee.CharField()
    code = peewee.CharField()
    sentence = peewee.TextField()
    reservation = peewee.ForeignKeyField(Reservation, null=True)
    occurrence = peewee.IntegerField(null=True)  # of a series, the one that it is about
    # of the reservation then, or of what was refused, which is none
    project = peewee.CharField(default='')
    resource = peewee.ForeignKeyField(Resource, index=False, null=True)  # of what was refused


class Outbox(Table):
    """A notice on its way: sent when it is written down with its event, until it has arrived."""
    event = peewee.ForeignKeyField(Event, index=False)
    target = peewee.CharField()
    owner = peewee.CharField(default='')  # who wants it told, PROJECT/USER; '': the operator
    tries = peewee.IntegerField(default=0)
    due = peewee.DoubleField(null=True)  # NULL: it has arrived, or was given up
    fault = peewee.TextField(default='')


class Mailed(Table):
    """How many mails were written down on a day, by whose they are."""
    owner = peewee.CharField(primary_key=True)  # PROJECT/USER
    day = peewee.IntegerField()                 # since 1970
    number = peewee.IntegerField()


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


TABLES = [Resource, Reservation, Occurrence, Texts, Capacity, Proposal, ExtraHold, Wait, Limit,
          Step, Server, Claim, Tally, Token, Session, OnceDone, Feed, Subscription, Event, Outbox,
          Mailed, Lease, Fact, SimulatedServer]

#: Indexes that fields don't tell of. `occurrence_ended` finds what a wrong clock has ended.
INDEXES = '''
  capacity_end ON capacity ("end") WHERE removed IS NULL;
  claim_due ON claim (due) WHERE due IS NOT NULL;
  claim_gone ON claim (gone);
  claim_of ON claim (occurrence, due);
  claim_there ON claim (resource_id, occurrence) WHERE due IS NOT NULL;
  event_project ON event (project) WHERE project != '';
  event_refused ON event (at) WHERE code = 'refused';
  feed_of ON feed (user, project) WHERE revoked IS NULL;
  occurrence_ended ON occurrence ("end") WHERE due IS NULL AND cancelled IS NULL;
  outbox_due ON outbox (due) WHERE due IS NOT NULL;
  outbox_event ON outbox (event_id);
  proposal_until ON proposal (until);
  reservation_lead ON reservation (lead) WHERE lead > 0;
  reservation_pending ON reservation (pending) WHERE pending IS NOT NULL;
  reservation_request ON reservation (request) WHERE request != '';
  reservation_series ON reservation (over, carried) WHERE series != '';
  reservation_server ON reservation (server) WHERE server != '';
  reservation_subscription ON reservation (subscription, over) WHERE subscription IS NOT NULL;
  reservation_uid ON reservation (uid) WHERE uid IS NOT NULL;
  reservation_waiting ON reservation (waiting) WHERE waiting IS NOT NULL;
  server_deleted ON server (deleted);
  server_due ON server (due) WHERE due IS NOT NULL;
  server_kept ON server (account) WHERE state = 'kept';
  server_of ON server (occurrence_id, n);
  server_planned ON server (planned);
  server_there ON server (account) WHERE state != 'deleted';
  server_uid ON server (uid) WHERE uid IS NOT NULL;
  subscription_due ON subscription (due) WHERE due IS NOT NULL;
  subscription_of ON subscription (user, project) WHERE due IS NOT NULL;
  token_of ON token (user, project) WHERE revoked IS NULL;
  wait_due ON wait (due);
  wait_limited ON wait (limited) WHERE limited;
  wait_since ON wait (resource_id, since);
  wait_there ON wait (resource_id, until)''' + ''.join(
    f';\n  occurrence_{name} ON occurrence ({columns})' + (f' WHERE {which}' if which else '')
    for name, (columns, which) in ORDERS.items())
UNIQUE = ('claim_server ON claim (resource_id, server)',
          'resource_name ON resource (name) WHERE removed IS NULL')


#: What brings an older store up to the models above, one function a version. None reads the models,
#: which tell of today: each names its tables and columns.
MIGRATIONS: list[Callable] = [
    lambda: add_tracks(), lambda: add_proposals(), lambda: add_up_told(), lambda: add_owners(),
    lambda: trust_names(), lambda: add_sessions(), lambda: add_ends_of_calls(),
    lambda: keep_resource_ids(), lambda: end_left_calendars(), lambda: add_whose(),
    lambda: add_waits(), lambda: add_sums(), lambda: add_once(), lambda: add_ends_of_tokens()]


def long_texts(row: str) -> str:
    """How many characters of long texts a reservation has; in a trigger, `row` is NEW or OLD."""
    return f'(length({row}.user_data) + length({row}.description) + length({row}.metadata))'


#: What keeps the owners of occurrences as their reservations have them, and counts texts.
#: Version 13 made them; a version with others drops these.
TRIGGERS = TRIGGERS_OF_13 = (f'''
  CREATE TRIGGER IF NOT EXISTS reservation_texts AFTER INSERT ON reservation WHEN {long_texts('NEW')} > 1000 BEGIN
    INSERT INTO texts VALUES (NEW.project, {long_texts('NEW')})
      ON CONFLICT (project) DO UPDATE SET size = size + excluded.size;
  END''', f'''
  CREATE TRIGGER IF NOT EXISTS reservation_texts_changed AFTER UPDATE OF project, user_data, description, metadata
    ON reservation WHEN {long_texts('NEW')} > 1000 OR {long_texts('OLD')} > 1000 BEGIN
    UPDATE texts SET size = size - iif({long_texts('OLD')} > 1000, {long_texts('OLD')}, 0) WHERE project = OLD.project;
    INSERT INTO texts SELECT NEW.project, {long_texts('NEW')} WHERE {long_texts('NEW')} > 1000
      ON CONFLICT (project) DO UPDATE SET size = size + excluded.size;
  END''', f'''
  CREATE TRIGGER IF NOT EXISTS reservation_texts_gone AFTER DELETE ON reservation WHEN {long_texts('OLD')} > 1000 BEGIN
    UPDATE texts SET size = size - {long_texts('OLD')} WHERE project = OLD.project;
  END''', '''
  CREATE TRIGGER IF NOT EXISTS occurrence_owner AFTER INSERT ON occurrence WHEN NEW.of_project = '' BEGIN
    UPDATE occurrence SET (of_project, of_user) = (SELECT project, user FROM reservation WHERE id = NEW.reservation_id)
     WHERE id = NEW.id;
  END''', '''
  CREATE TRIGGER IF NOT EXISTS reservation_owner AFTER UPDATE OF project, user ON reservation
    WHEN (NEW.project, NEW.user) <> (OLD.project, OLD.user) BEGIN
    UPDATE occurrence SET of_project = NEW.project, of_user = NEW.user WHERE reservation_id = NEW.id;
  END''')


def open_store(path: str, key: str = '', make: bool = True) -> None:
    """Opens the database for all threads. Where none ever was, it and its key are made.

    Args:
      key: the file of the key, if it is not the one beside the database
      make: false if a database that is not there is not to be made: NotFound
    """
    close_store()
    if not path:
        raise Invalid('setting database: a file name is needed, such as cmres.db')
    file = key_file(path, key)
    known = known_store(file)
    if known and not os.path.exists(path):
        raise Unavailable(STORE_GONE.format(path, file))
    if not make:
        refuse_missing(path)
    try:
        take_file(path, known)
        remember(file, store_file.store)
    except (Error, OSError, *STORE_ERRORS) as error:
        close_store()
        if isinstance(error, Error):
            raise
        raise Unavailable(f"can't open the database '{path}': {first_line(error)}") from None


def take_file(path: str, known: str) -> None:
    """Takes a database file into use, and makes it if it is not there."""
    with suppress(FileExistsError):
        make_private(path)
    store_file.hold(path)
    version = refuse_other(path, known)
    db.init(file_uri(path), timeout=PATIENT, uri=True)
    if not version:
        make_tables()
    store_file.recognise()
    store_file.store = fact('store')
    ROW_TYPES.clear()  # in another store, columns may stand in another order


def refuse_missing(path: str) -> None:
    """NotFound if there is no database."""
    if not os.path.exists(path):
        raise NotFound(NO_STORE.format(os.path.abspath(path)))


NO_STORE = ("there is no database '{}'. `serve` makes one (`serve --demo` with something to try), "
            'and so does `resource add`. If there is one elsewhere, go to its folder or name it '
            'with the setting `database`')
STORE_GONE = ("the database '{0}' is gone, and there was one: '{1}' remembers it. Bring it back "
              "with `store restore FILE`. To begin with an empty one, delete '{1}'")
STORE_OLDER = ("the database '{0}' is of version {1}, this cmres needs version {2}. Stop all "
               'processes of cmres, then run `store migrate`; `serve`, `scheduler` and `tick` do '
               'it as well')
STORE_NEWER = ("a newer cmres wrote the database '{0}' (version {1}, here {2}): use that version "
               'or a later one')
OTHER_KEY = ("the database '{}' is {}, but its key is of store {}: put the right file back, or "
             'restore a backup with `store restore FILE`')


def latest_version() -> int:
    """The version of the database that this program reads and writes."""
    return len(MIGRATIONS) + 1


def refuse_other(path: str, known: str) -> int:
    """The version of a database, 0 of an empty one; refuses what is not the store of this key."""
    application, version, store = told_by(store_file.guard)
    latest = latest_version()
    if application != OURS and version is None:
        raise Unavailable(f"'{path}' is a database of something else; name another file")
    if known and store != known:
        raise Unavailable(OTHER_KEY.format(path, f'store {store}' if store else 'empty', known))
    if version and version != latest:
        refusal = STORE_OLDER if version < latest else STORE_NEWER
        raise Unavailable(refusal.format(path, version, latest))
    return version


def told_by(connection: sqlite3.Connection) -> tuple[int, int | None, str]:
    """Of a database: application id; version, None if not ours, 0 if empty; id of the store."""
    application, version = (connection.execute(f'PRAGMA {each}').fetchone()[0]
                            for each in ('application_id', 'user_version'))
    tables = {each[0] for each in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        return OURS, 0, ''
    if not {'fact', 'reservation', 'occurrence'} <= tables or application not in (0, OURS):
        return application, None, ''
    found = connection.execute("SELECT value FROM fact WHERE name = 'store'").fetchone()
    return OURS, version, found[0] if found else ''


def close_store() -> None:
    """Closes this thread's connection, and lets other processes replace the file."""
    if not db.deferred and not db.is_closed():
        db.close()
    store_file.release()


def make_tables() -> None:
    """Makes the tables of an empty database, unless another process was faster."""
    with transaction():
        if db.user_version == 0:
            db.create_tables(TABLES)
            for index in INDEXES.split(';'):
                run(f'CREATE INDEX {index}')
            for index in UNIQUE:
                run(f'CREATE UNIQUE INDEX {index}')
            for trigger in TRIGGERS:
                run(trigger)
            insert(Fact, name='store', value=secrets.token_hex(4))
            db.user_version, db.application_id = latest_version(), OURS


# The key is not in the store: whoever reads a backup must not be able to sign in. Its second line
# is the id of the store, so that a store that is gone is missed and not made anew.


def key_file(path: str, key: str = '') -> str:
    """Where the key of a database is."""
    return key or f'{path}.key'


def known_store(file: str) -> str:
    """The id of the store that a key remembers; '' if there is none."""
    try:
        with open(file, encoding='ascii') as lines:
            return [*lines.read().splitlines(), '', ''][1].strip()
    except FileNotFoundError:
        return ''
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"can't read the key '{file}': {first_line(error)}") from None


def read_key(file: str) -> bytes:
    """The key that cookies are signed with; Unavailable if it is none."""
    try:
        with open(file, encoding='ascii') as lines:
            key = bytes.fromhex(lines.readline())
    except (OSError, ValueError) as error:
        raise Unavailable(f"can't read the key '{file}': {first_line(error)}") from None
    if len(key) < 32:
        raise Unavailable(f"'{file}' is no key: its first line must be 64 hexadecimal digits")
    return key


def read_keys(file: str) -> list[bytes]:
    """The key, and those before it that are still good: whose cookies have not ended yet."""
    with open(file, encoding='ascii') as lines:
        older = [line.split() for line in lines.read().splitlines()[2:]]
    good = [bytes.fromhex(key) for key, until in older if int(until) > time.time()]
    return [read_key(file), *good]


def rotate_key(file: str, until: int) -> int:
    """Makes a new key; those before it are good until an instant. How many keys there are now."""
    keys = read_keys(file)
    write_key(file, secrets.token_hex(32), known_store(file),
              *(f'{each.hex()} {until}' for each in keys))
    return len(keys) + 1


def remember(file: str, store: str) -> None:
    """Makes the key, or notes in it which store it is of."""
    if known_store(file) != store:
        key = read_key(file).hex() if os.path.exists(file) else secrets.token_hex(32)
        write_key(file, key, store)


def write_key(file: str, *said: str) -> None:
    """Writes a key, all of it or nothing."""
    part = f'{file}.{secrets.token_hex(4)}'
    make_private(part)
    with open(part, 'w', encoding='ascii') as lines:
        lines.write('\n'.join([*said, '']))
        lines.flush()
        os.fsync(lines.fileno())
    os.replace(part, file)


def make_private(path: str) -> None:
    """Makes an empty file that only its owner can read; FileExistsError if there is one."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


# Copies, migrations and restored stores.


def copy_store(source: str, target: str) -> None:
    """Copies a database as it is at one instant, also while others write; whole, or not at all."""
    if os.path.exists(target):
        raise Conflict(f"'{target}' is there already: choose another name")
    part = f'{target}.{secrets.token_hex(4)}'
    try:
        make_private(part)
        with closing(connect(source)) as old, closing(connect(part)) as new:
            old.backup(new)
            new.execute('PRAGMA journal_mode = DELETE')  # a copy is one file
        os.replace(part, target)
    except (OSError, sqlite3.Error) as error:
        raise Unavailable(f"can't copy '{source}' to '{target}': {first_line(error)}") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


@contextmanager
def alone_with(path: str) -> Iterator[None]:
    """Holds a database for this process alone, also against older programs, which know no lock."""
    close_store()
    lock = lock_store(path, alone=True)
    try:
        if os.path.exists(path):
            leave_wal(path)
        yield
    finally:
        os.close(lock)


def leave_wal(path: str) -> None:
    """Brings the log of a database into it; Unavailable where anybody else has it open."""
    try:
        with closing(connect(path, timeout=1)) as connection:
            connection.execute('PRAGMA journal_mode = DELETE').fetchone()
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xff == sqlite3.SQLITE_BUSY:
            raise Unavailable(IN_USE.format(path)) from None


def migrate_store(path: str) -> dict | None:
    """Brings an older database up to this version, after a copy of it was made beside it: both
    versions and the name of the copy; None if there was nothing to do.
    """
    before = version_of(path)
    if not 0 < before < latest_version():
        return None
    with alone_with(path):
        copy = f'{path}.version-{before}-{stamp()}'
        copy_store(path, copy)
        db.init(file_uri(path), timeout=PATIENT, uri=True)
        try:
            run_migrations(before)
        finally:
            db.close()
        os.chmod(path, 0o600)  # older programs let everybody read it
    return {'database': path, 'before': before, 'after': latest_version(), 'copy': copy}


def run_migrations(before: int) -> None:
    """Brings the tables of a version up to those of today, all in one transaction."""
    with transaction():
        for step in MIGRATIONS[before - 1:]:
            step()
        db.user_version, db.application_id = latest_version(), OURS


def version_of(path: str) -> int:
    """The version of a database of ours; 0 of any other file, and of none."""
    try:
        with closing(connect(path)) as connection:
            return told_by(connection)[1] or 0
    except sqlite3.Error:
        return 0


def stamp() -> str:
    """The present instant for the name of a file."""
    return f'{datetime.now(UTC):%Y%m%dT%H%M%S.%f}'


def verify_store(path: str) -> dict:
    """Reads all of a database file: its version and number of reservations, or Unavailable."""
    if not os.path.exists(path):
        raise NotFound(f"there is no file '{path}'")
    try:
        with closing(connect(path)) as connection:
            faults = damage_of(connection, 'integrity_check') or loose_row(connection)
            _, version, store = told_by(connection)
            count = connection.execute('SELECT count(*) FROM reservation') if version else [(0,)]
            found = {'version': version, 'store': store, 'reservations': next(iter(count))[0]}
    except sqlite3.Error as error:
        raise Unavailable(f"'{path}' is damaged or no database: {error}") from None
    if faults:
        raise Unavailable(f"'{path}' is damaged: {faults}")
    if version is None:
        raise Unavailable(f"'{path}' is a database of something else")
    return {'file': path} | found | {'result': 'ok'}


def loose_row(connection: sqlite3.Connection) -> str:
    """Which table has a row that points to one that is not there; '' if none has."""
    found = connection.execute('PRAGMA foreign_key_check').fetchone()
    return f'a row of {found[0]} points to one that is not there' if found else ''


def damage_of(connection: sqlite3.Connection, check: str = 'quick_check') -> str:
    """What SQLite finds wrong with a file; '' if nothing."""
    found = [each[0] for each in connection.execute(f'PRAGMA {check}(3)')]
    return '' if found == ['ok'] else shown('; '.join(found))


def restore_store(path: str, copy: str, key: str = '') -> dict:
    """Puts a copy in the place of a database, which is kept beside it.

    Servers made since the copy was written are unknown to it. So it notes that it was restored,
    which keeps them until an admin decides, and numbers new servers far behind them, so that no
    mark is used twice.
    """
    found = verify_store(copy)
    if not found['version']:
        raise Unavailable(f"'{copy}' is empty")
    if found['version'] > latest_version():
        raise Unavailable(STORE_NEWER.format(copy, found['version'], latest_version()))
    with alone_with(path):
        part = f'{path}.restored-{stamp()}'
        copy_store(copy, part)
        note_restored(part)
        aside = set_aside(path)
        os.rename(part, path)
        remember(key_file(path, key), found['store'])
    answer = {'database': path, 'from': copy, 'reservations': found['reservations']}
    return answer | ({'before': aside} if os.path.exists(aside) else {})


def set_aside(path: str) -> str:
    """Gives the files of a database another name, and tells it."""
    aside = f'{path}.before-{stamp()}'
    for side in SIDES:
        if os.path.exists(path + side):
            os.rename(path + side, aside + side)
    return aside


def note_restored(path: str) -> None:
    with closing(connect(path)) as connection:
        last = connection.execute('SELECT coalesce(max(id), 0) FROM server').fetchone()[0]
        connection.executemany('INSERT OR REPLACE INTO fact (name, value) VALUES (?, ?)', [
            ('restored', f'{int(time.time())}'), ('next server', f'{last + 1_000_000}')])


def next_server() -> int:
    """An id that no server had before, nor one made between a backup and its restoring."""
    last = row('SELECT coalesce(max(id), 0) AS id FROM server').id
    return max(last + 1, int(fact('next server') or 0))


def fact(name: str) -> str:
    """What the store knows of itself under a name; '' if nothing."""
    found = row('SELECT value FROM fact WHERE name = ?', name)
    return found.value if found else ''


def note_fact(name: str, value: str) -> None:
    """Notes a fact, in the place of what it was before."""
    run('INSERT INTO fact (name, value) VALUES (?, ?) '
        'ON CONFLICT (name) DO UPDATE SET value = excluded.value', name, value)


#: The columns that the store got while its version was 1, by their types.
COLUMNS_OF_1 = {
    "VARCHAR(255) NOT NULL DEFAULT ''": """
        reservation.server reservation.at_end reservation.repeat reservation.tz reservation.origin
        reservation.on_conflict reservation.request reservation.host server.snapshot
        server.snapshot_id occurrence.slot resource.mode event.project event.resource""",
    "VARCHAR(255) NOT NULL DEFAULT 'up'": 'server.goal',
    "VARCHAR(255) NOT NULL DEFAULT 'active'": 'simulated_server.power',
    'VARCHAR(255)': 'reservation.uid',
    "TEXT NOT NULL DEFAULT ''": """
        reservation.series reservation.choices resource.classes resource.named occurrence.classes
        claim.classes capacity.classes capacity.held_classes""",
    "TEXT NOT NULL DEFAULT '[]'": 'reservation.notify resource.hosts',
    "TEXT NOT NULL DEFAULT '{}'": 'subscription.refused',
    'INTEGER NOT NULL DEFAULT 0': """
        occurrence.told occurrence.altered occurrence.revision occurrence.revised server.borrowed
        reservation.personal reservation.priority reservation.confirm resource.hold
        resource.approval resource.no_show""",
    'INTEGER': """
        event.occurrence reservation.booked_until reservation.subscription reservation.waiting
        reservation.pending""",
    'REAL': 'simulated_server.saved claim.gone'}

#: The tables that came while the version was 1, and all indexes of version 2.
TABLES_OF_2 = """
    CREATE TABLE IF NOT EXISTS outbox (
      id INTEGER NOT NULL PRIMARY KEY, event_id INTEGER NOT NULL REFERENCES event (id),
      target VARCHAR(255) NOT NULL, tries INTEGER NOT NULL, due REAL, fault TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS lease (
      name VARCHAR(255) NOT NULL PRIMARY KEY, holder VARCHAR(255) NOT NULL, until REAL NOT NULL);
    CREATE TABLE IF NOT EXISTS feed (
      id INTEGER NOT NULL PRIMARY KEY, user VARCHAR(255) NOT NULL, project VARCHAR(255) NOT NULL,
      whole_project INTEGER NOT NULL, resource VARCHAR(255) NOT NULL, hash VARCHAR(255) NOT NULL,
      added INTEGER NOT NULL, revoked INTEGER);
    CREATE TABLE IF NOT EXISTS subscription (
      id INTEGER NOT NULL PRIMARY KEY, user VARCHAR(255) NOT NULL, project VARCHAR(255) NOT NULL,
      url VARCHAR(255) NOT NULL, defaults TEXT NOT NULL, notify TEXT NOT NULL,
      etag VARCHAR(255) NOT NULL, modified VARCHAR(255) NOT NULL, fault TEXT NOT NULL,
      refused TEXT NOT NULL, held TEXT NOT NULL, confirmed INTEGER NOT NULL,
      tries INTEGER NOT NULL, polled REAL, due REAL, added INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS claim (
      id INTEGER NOT NULL PRIMARY KEY, resource_id INTEGER NOT NULL REFERENCES resource (id),
      occurrence INTEGER, server VARCHAR(255) NOT NULL, project VARCHAR(255) NOT NULL,
      user VARCHAR(255) NOT NULL, vcpus INTEGER NOT NULL, ram INTEGER NOT NULL,
      classes TEXT NOT NULL, at REAL NOT NULL, due REAL, gone REAL);
    CREATE TABLE IF NOT EXISTS capacity (
      id INTEGER NOT NULL PRIMARY KEY, resource_id INTEGER NOT NULL REFERENCES resource (id),
      start INTEGER NOT NULL, "end" INTEGER NOT NULL, vms INTEGER, vcpus INTEGER, ram INTEGER,
      held_vms INTEGER NOT NULL, held_vcpus INTEGER NOT NULL, held_ram INTEGER NOT NULL,
      classes TEXT NOT NULL, held_classes TEXT NOT NULL, reason VARCHAR(255) NOT NULL,
      added INTEGER NOT NULL, removed INTEGER);
    CREATE TABLE IF NOT EXISTS limits (
      id INTEGER NOT NULL PRIMARY KEY, project VARCHAR(255) NOT NULL, user VARCHAR(255) NOT NULL,
      resource VARCHAR(255) NOT NULL, most_vms INTEGER, longest INTEGER, ahead INTEGER,
      least_notice INTEGER, vcpu_hours INTEGER, waiting INTEGER, exempt INTEGER NOT NULL,
      added INTEGER NOT NULL);
    DROP INDEX IF EXISTS occurrence_held;
    DROP INDEX IF EXISTS occurrence_reservation_id;
    CREATE INDEX occurrence_held ON occurrence (resource_id, held_from) WHERE due IS NOT NULL;
    CREATE INDEX IF NOT EXISTS occurrence_reservation_id_start
      ON occurrence (reservation_id, start);
    CREATE INDEX IF NOT EXISTS outbox_due ON outbox (due) WHERE due IS NOT NULL;
    CREATE UNIQUE INDEX IF NOT EXISTS feed_hash ON feed (hash);
    CREATE INDEX IF NOT EXISTS subscription_due ON subscription (due) WHERE due IS NOT NULL;
    CREATE UNIQUE INDEX IF NOT EXISTS claim_server ON claim (resource_id, server);
    CREATE INDEX IF NOT EXISTS claim_occurrence ON claim (occurrence) WHERE due IS NOT NULL;
    CREATE INDEX IF NOT EXISTS claim_due ON claim (due) WHERE due IS NOT NULL;
    CREATE INDEX IF NOT EXISTS capacity_resource_id ON capacity (resource_id);
    CREATE INDEX IF NOT EXISTS reservation_uid ON reservation (uid) WHERE uid IS NOT NULL;
    CREATE INDEX IF NOT EXISTS reservation_request ON reservation (request) WHERE request != '';
    CREATE INDEX IF NOT EXISTS reservation_waiting
      ON reservation (waiting) WHERE waiting IS NOT NULL;
    CREATE INDEX IF NOT EXISTS reservation_pending
      ON reservation (pending) WHERE pending IS NOT NULL"""

STEPS_OF_2 = """
    ALTER TABLE step RENAME TO old_step;
    CREATE TABLE step (
      resource_id INTEGER NOT NULL REFERENCES resource (id), track VARCHAR(255) NOT NULL,
      at INTEGER NOT NULL, vms INTEGER NOT NULL, vcpus INTEGER NOT NULL, ram INTEGER NOT NULL,
      PRIMARY KEY (resource_id, track, at)) WITHOUT ROWID;
    INSERT INTO step SELECT resource_id, '', at, vms, vcpus, ram FROM old_step;
    DROP TABLE old_step"""

#: Before there were ends and goals, every machine was deleted at the end.
GOALS_OF_2 = """
    UPDATE reservation SET at_end = 'delete' WHERE image <> '';
    UPDATE server SET goal = iif(wanted, 'up', 'delete');
    ALTER TABLE server DROP COLUMN wanted"""


def columns_of(table: str) -> set[str]:
    """The columns that a table has in the file; none if there is no such table."""
    return {each[1] for each in run(f'PRAGMA table_info({table})')}


def run_all(statements: str) -> None:
    """Runs statements with semicolons between, within the present transaction."""
    for each in statements.split(';'):
        run(each)


def add_columns(table: str, columns: dict[str, str]) -> None:
    """Gives a table the columns, name by type, that it has not yet."""
    for name in columns.keys() - columns_of(table):
        run(f'ALTER TABLE {table} ADD COLUMN {name} {columns[name]}')


def add_tracks() -> None:
    """Version 2: parts, hosts, resource classes, tracks of steps; what version 1 got on its way."""
    for kind, names in COLUMNS_OF_1.items():
        for table, column in (each.split('.') for each in names.split()):
            if (known := columns_of(table)) and column not in known:
                run(f'ALTER TABLE {table} ADD COLUMN {column} {kind}')
    if 'wanted' in columns_of('server'):
        run_all(GOALS_OF_2)
    run_all(TABLES_OF_2)
    if 'track' not in columns_of('step'):
        run_all(STEPS_OF_2)


def add_proposals() -> None:
    """Version 3: changes that await approval, and what is held beside occurrences."""
    run_all("""
        CREATE TABLE IF NOT EXISTS proposal (id INTEGER NOT NULL PRIMARY KEY,
          reservation_id INTEGER NOT NULL REFERENCES reservation (id), occurrence INTEGER NOT NULL,
          alone INTEGER NOT NULL, user VARCHAR(255) NOT NULL, code VARCHAR(255) NOT NULL, asked TEXT NOT NULL,
          named INTEGER NOT NULL, wish TEXT NOT NULL, shown TEXT NOT NULL, until INTEGER NOT NULL);
        CREATE INDEX IF NOT EXISTS proposal_reservation_id ON proposal (reservation_id);
        CREATE INDEX IF NOT EXISTS proposal_until ON proposal (until);
        CREATE TABLE IF NOT EXISTS extra_hold (id INTEGER NOT NULL PRIMARY KEY,
          reservation_id INTEGER NOT NULL REFERENCES reservation (id), proposal_id INTEGER REFERENCES proposal (id),
          resource_id INTEGER NOT NULL REFERENCES resource (id), held_from INTEGER NOT NULL,
          held_until INTEGER NOT NULL, vms INTEGER NOT NULL, vcpus INTEGER NOT NULL, ram INTEGER NOT NULL,
          classes TEXT NOT NULL);
        CREATE INDEX IF NOT EXISTS extra_hold_reservation_id ON extra_hold (reservation_id);
        CREATE INDEX IF NOT EXISTS extra_hold_proposal_id ON extra_hold (proposal_id);
        CREATE INDEX IF NOT EXISTS extra_hold_resource_id ON extra_hold (resource_id);
        CREATE INDEX IF NOT EXISTS server_kept ON server (account) WHERE state = 'kept'""")


def add_up_told() -> None:
    """Version 4: how many servers were told to be up."""
    add_columns('occurrence', {'up_told': 'INTEGER', 'up_check': 'REAL'})
    # Of what was ready before this version, that was told.
    run('UPDATE occurrence SET up_told = vms WHERE due IS NOT NULL AND told & 2')


def add_owners() -> None:
    """Version 5: whose notices are on their way, and how many mails somebody has had sent."""
    add_columns('outbox', {'owner': "VARCHAR(255) NOT NULL DEFAULT ''"})
    run('CREATE TABLE IF NOT EXISTS mailed (owner VARCHAR(255) NOT NULL PRIMARY KEY, '
        'day INTEGER NOT NULL, number INTEGER NOT NULL)')


def trust_names() -> None:
    """Version 6: names are looked at with the rights of who asks; what was booked goes on."""
    add_columns('reservation', {'trusted': "TEXT NOT NULL DEFAULT '[]'"})
    run('''UPDATE reservation SET trusted = (SELECT json_group_array(name) FROM (
             SELECT 'flavor:' || flavor AS name WHERE flavor <> '' UNION ALL
             SELECT 'image:' || image WHERE image <> '' UNION ALL
             SELECT 'network:' || network WHERE network <> '' UNION ALL
             SELECT 'key:' || key WHERE key <> '' UNION ALL
             SELECT 'server:' || server WHERE server <> '' UNION ALL
             SELECT 'security_group:' || value FROM json_each(security_groups)))''')
    run('CREATE INDEX IF NOT EXISTS server_uid ON server (uid) WHERE uid IS NOT NULL')


def add_sessions() -> None:
    """Version 7: who has signed in, by hashes; the key that signs is not in the store any more."""
    run_all("""
        CREATE TABLE session (
          hash VARCHAR(255) NOT NULL PRIMARY KEY, token_id INTEGER NOT NULL REFERENCES token (id),
          until INTEGER NOT NULL);
        CREATE INDEX session_until ON session (until);
        DELETE FROM fact WHERE name = 'page' OR name LIKE 'out %'""")


def add_ends_of_calls() -> None:
    """Version 8: calls whose end is not known, how far series are, what waits or has ended."""
    add_columns('server', {'intended': 'REAL'})
    add_columns('reservation', {'carried': 'VARCHAR(255)'})
    run("UPDATE server SET intended = called WHERE state = 'build' AND uid IS NULL AND due IS NOT "
        "NULL")
    run('CREATE INDEX IF NOT EXISTS occurrence_ended ON occurrence ("end") '
        'WHERE due IS NULL AND cancelled IS NULL')
    run("CREATE INDEX IF NOT EXISTS reservation_series ON reservation (over, carried) WHERE series "
        "!= ''")
    run('UPDATE reservation SET waiting = NULL, pending = NULL '
        'WHERE (waiting IS NOT NULL OR pending IS NOT NULL) AND NOT EXISTS '
        '(SELECT 1 FROM occurrence WHERE reservation_id = reservation.id AND cancelled IS NULL)')


def keep_resource_ids() -> None:
    """Version 9: what is kept for a resource has its id, which a new name doesn't change."""
    same_name = ('SELECT id FROM resource WHERE name = {} '
                 'ORDER BY removed IS NOT NULL, id DESC LIMIT 1')
    for table in ('limits', 'feed', 'event'):
        run(f'ALTER TABLE {table} ADD COLUMN resource_id INTEGER REFERENCES resource (id)')
        run(f"UPDATE {table} SET resource_id = ({same_name.format('resource')}) "
            "WHERE resource <> ''")
    # What was kept for a name that no resource has any more was in force nowhere.
    run("DELETE FROM limits WHERE resource <> '' AND resource_id IS NULL")
    run("UPDATE feed SET revoked = added "
        "WHERE resource <> '' AND resource_id IS NULL AND revoked IS NULL")
    for table in ('limits', 'feed', 'event'):
        run(f'ALTER TABLE {table} DROP COLUMN resource')
    told = "json_extract(defaults, '$.resource')"
    run(f"UPDATE subscription SET defaults = json_set(defaults, '$.resource', "
        f"coalesce(({same_name.format(told)}), 0))")


def end_left_calendars() -> None:
    """Version 10: feeds and subscriptions end whose owners had tokens, all of them revoked."""
    for table, ends in (('feed', 'revoked = 0'), ('subscription', 'due = NULL')):
        live = 'revoked IS NULL' if table == 'feed' else 'due IS NOT NULL'
        owner = f'token t WHERE t.user = {table}.user AND t.project = {table}.project'
        run(f'UPDATE {table} SET {ends} WHERE {live} AND EXISTS (SELECT 1 FROM {owner}) '
            f'AND NOT EXISTS (SELECT 1 FROM {owner} AND t.revoked IS NULL)')


#: The indexes that came with version 11, and those in whose place they are.
INDEXES_OF_11 = """
    DROP INDEX IF EXISTS claim_occurrence;
    DROP INDEX IF EXISTS occurrence_held;
    DROP INDEX IF EXISTS occurrence_reservation_id_start;
    DROP INDEX IF EXISTS reservation_project_label_over;
    DROP INDEX IF EXISTS server_occurrence_id;
    CREATE INDEX capacity_end ON capacity ("end") WHERE removed IS NULL;
    CREATE INDEX claim_gone ON claim (gone);
    CREATE INDEX claim_of ON claim (occurrence, due);
    CREATE INDEX claim_there ON claim (resource_id, occurrence) WHERE due IS NOT NULL;
    CREATE INDEX event_project ON event (project) WHERE project != '';
    CREATE INDEX event_refused ON event (at) WHERE code = 'refused';
    CREATE INDEX occurrence_cancelled ON occurrence (start) WHERE cancelled IS NOT NULL;
    CREATE INDEX occurrence_failed ON occurrence (start) WHERE told & 128;
    CREATE INDEX occurrence_long ON occurrence (start) WHERE "end" - start > 86400;
    CREATE INDEX occurrence_longest ON occurrence (start) WHERE "end" - start > 2678400;
    CREATE INDEX occurrence_over ON occurrence (start) WHERE due IS NULL;
    CREATE INDEX occurrence_place_live ON occurrence (resource_id, start) WHERE due IS NOT NULL;
    CREATE INDEX occurrence_place_over ON occurrence (resource_id, start) WHERE due IS NULL;
    CREATE INDEX occurrence_project_live ON occurrence (of_project, start) WHERE due IS NOT NULL;
    CREATE INDEX occurrence_project_over ON occurrence (of_project, start) WHERE due IS NULL;
    CREATE INDEX occurrence_series ON occurrence (reservation_id, due IS NULL, start);
    CREATE INDEX occurrence_user_live ON occurrence (of_user, start) WHERE due IS NOT NULL;
    CREATE INDEX occurrence_user_over ON occurrence (of_user, start) WHERE due IS NULL;
    CREATE INDEX outbox_event ON outbox (event_id);
    CREATE INDEX reservation_label_project_over ON reservation (label, project, over);
    CREATE INDEX reservation_lead ON reservation (lead) WHERE lead > 0;
    CREATE INDEX reservation_server ON reservation (server) WHERE server != '';
    CREATE INDEX reservation_subscription ON reservation (subscription, over)
      WHERE subscription IS NOT NULL;
    CREATE INDEX server_deleted ON server (deleted);
    CREATE INDEX server_of ON server (occurrence_id, n);
    CREATE INDEX server_planned ON server (planned);
    CREATE INDEX server_there ON server (account) WHERE state != 'deleted'"""


def add_whose() -> None:
    """Version 11: occurrences and events tell whose they are; indexes in the order of lists."""
    name = "VARCHAR(255) NOT NULL DEFAULT ''"
    add_columns('occurrence', {'of_project': name, 'of_user': name})
    run('UPDATE occurrence SET (of_project, of_user) = '
        '(SELECT project, user FROM reservation r WHERE r.id = reservation_id)')
    run('UPDATE event SET project = (SELECT project FROM reservation r WHERE r.id = '
        'reservation_id) WHERE reservation_id IS NOT NULL')
    run('UPDATE occurrence SET told = told | 128 '
        "WHERE id IN (SELECT occurrence FROM event WHERE code = 'failed') OR reservation_id IN "
        "(SELECT reservation_id FROM event WHERE code = 'failed' AND occurrence IS NULL)")
    run_all(INDEXES_OF_11)


def add_waits() -> None:
    """Version 12: who waits is found by the resources on which that could be."""
    run_all("""
        CREATE TABLE wait (
          id INTEGER NOT NULL PRIMARY KEY, reservation_id INTEGER NOT NULL REFERENCES reservation (id),
          resource_id INTEGER NOT NULL REFERENCES resource (id), held_from INTEGER NOT NULL,
          until INTEGER NOT NULL, since INTEGER NOT NULL, limited INTEGER NOT NULL, due REAL NOT NULL);
        INSERT INTO wait (reservation_id, resource_id, held_from, until, since, limited, due)
          SELECT r.id, coalesce(json_extract(c.value, '$[0]'), o.resource_id), o.held_from, o."end",
                 r.waiting, 0, 0
            FROM reservation r JOIN occurrence o ON o.reservation_id = r.id
            JOIN json_each(iif(r.choices = '', '[null]', r.choices)) c
           WHERE r.waiting IS NOT NULL AND o.cancelled IS NULL AND o.due IS NOT NULL;
        CREATE INDEX wait_due ON wait (due);
        CREATE INDEX wait_limited ON wait (limited) WHERE limited;
        CREATE INDEX wait_reservation_id ON wait (reservation_id);
        CREATE INDEX wait_since ON wait (resource_id, since);
        CREATE INDEX wait_there ON wait (resource_id, until)""")


def add_sums() -> None:
    """Version 13: the long texts of each project are counted; sums of days that are forgotten."""
    run_all("""
        CREATE TABLE texts (project VARCHAR(255) NOT NULL PRIMARY KEY, size INTEGER NOT NULL);
        INSERT INTO texts
          SELECT project, sum(length(user_data) + length(description) + length(metadata))
            FROM reservation
           WHERE length(user_data) + length(description) + length(metadata) > 1000 GROUP BY 1;
        CREATE TABLE tally (
          day INTEGER NOT NULL, project VARCHAR(255) NOT NULL, user VARCHAR(255) NOT NULL,
          resource INTEGER NOT NULL, reserved REAL NOT NULL, used REAL NOT NULL,
          unused REAL NOT NULL, refused INTEGER NOT NULL, late REAL NOT NULL,
          PRIMARY KEY (day, project, user, resource)) WITHOUT ROWID""")
    for trigger in TRIGGERS_OF_13:
        run(trigger)


def add_once() -> None:
    """Version 14: requests that name themselves are done once."""
    run_all("""
        CREATE TABLE once (
          user VARCHAR(255) NOT NULL, project VARCHAR(255) NOT NULL, key VARCHAR(255) NOT NULL,
          digest VARCHAR(255) NOT NULL, mark VARCHAR(255) NOT NULL, at INTEGER NOT NULL,
          status INTEGER NOT NULL, answer TEXT NOT NULL,
          PRIMARY KEY (user, project, key)) WITHOUT ROWID;
        CREATE INDEX once_at ON once (at)""")


def add_ends_of_tokens() -> None:
    """Version 15: tokens end, are for something, and tell when they were used."""
    name = "VARCHAR(255) NOT NULL DEFAULT ''"
    add_columns('token', {'purpose': name, 'scopes': name})
    add_columns('token', {'ends': 'INTEGER', 'last_used': 'INTEGER',
                          'resource_id': 'INTEGER REFERENCES resource (id)'})
    run_all("""
        CREATE INDEX IF NOT EXISTS session_token_id ON session (token_id);
        CREATE INDEX IF NOT EXISTS token_of ON token (user, project) WHERE revoked IS NULL;
        CREATE INDEX IF NOT EXISTS feed_of ON feed (user, project) WHERE revoked IS NULL;
        CREATE INDEX IF NOT EXISTS subscription_of ON subscription (user, project)
          WHERE due IS NOT NULL""")


# What goes wrong with the store. SQLite's first error is what the user is told, with what helps.

STORE_ERRORS = (peewee.DatabaseError, sqlite3.Error)
DAMAGED = 'the database is damaged: {}. Stop cmres and restore a backup with `store restore FILE`'
#: What SQLite's errors mean to people. Any other is a mistake of ours.
TROUBLES = {
    sqlite3.SQLITE_BUSY: f'the database was busy for {PATIENT} seconds. Nothing was changed. '
                         'Try again',
    sqlite3.SQLITE_LOCKED: 'the database was busy. Nothing was changed. Try again',
    sqlite3.SQLITE_NOMEM: 'there is not enough memory for the database: {}',
    sqlite3.SQLITE_FULL: 'the disk of the database is full: {}. Nothing was changed. An operator '
                         'must free space there',
    sqlite3.SQLITE_READONLY: 'the database is read-only: {}. Nothing was changed. An operator must '
                             'make it and its folder writable',
    sqlite3.SQLITE_IOERR: 'the disk of the database fails, or a quota is used up: {}. An operator '
                          'must look at the disk',
    sqlite3.SQLITE_CANTOPEN: 'the database can not be opened: {}. An operator must look at its '
                             'folder and its permissions',
    sqlite3.SQLITE_PROTOCOL: 'the database could not be locked: {}. Nothing was changed',
    sqlite3.SQLITE_CORRUPT: DAMAGED, sqlite3.SQLITE_NOTADB: DAMAGED}


def trouble(error: BaseException) -> Unavailable | None:
    """What is wrong with the store, for its users; None if the error is a mistake of ours."""
    if not isinstance(error, STORE_ERRORS):
        return None
    try:
        store_file.check()  # any error may follow from this one
    except Unavailable as lost:
        return lost
    return in_trouble(error)


def sqlite_error(error: BaseException) -> BaseException | None:
    """SQLite's own error behind another one."""
    while error and not hasattr(error, 'sqlite_errorcode'):
        error = error.__cause__ or error.__context__
    return error


def code_of(cause: BaseException | None) -> int | None:
    """The code of SQLite's own error; the rest of it is for experts."""
    return cause.sqlite_errorcode & 0xff if cause else None


def in_trouble(error: BaseException) -> Unavailable | None:
    """What SQLite's own error says of the store."""
    cause = sqlite_error(error)
    code = code_of(cause)
    if code not in TROUBLES:
        return None
    store_file.troubles += 1
    sentence = TROUBLES[code].format(f'{cause} ({cause.sqlite_errorname})')
    if TROUBLES[code] is DAMAGED:
        store_file.damage = sentence
    elif code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        store_file.failed = sentence, time.monotonic()
    return Unavailable(sentence)


def look_for_damage(path: str) -> str:
    """Reads a database file anew, and tells what is damaged; '' if nothing."""
    store_file.check()
    try:
        with closing(connect(path)) as connection:
            return damage_of(connection)
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xff not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        return f'{error}'


def note_check(now: float, damage: str) -> None:
    """Remembers what a check of the file has found, for all processes and for this one."""
    store_file.damage = DAMAGED.format(damage) if damage else ''
    if damage:
        log.critical('%s', store_file.damage)
    note_fact('checked', json.dumps({'at': int(now), 'result': damage or 'ok'}))


def probe(path: str) -> str:
    """Writes to the database on a connection of its own; what prevents that, '' if nothing."""
    try:
        store_file.check()
        write_probe(path)
    except (Unavailable, sqlite3.Error) as error:
        return str(error if isinstance(error, Unavailable) else trouble(error) or error)
    return ''


def write_probe(path: str) -> None:
    """Writes nothing but that it writes, on a connection that has read nothing before."""
    with closing(connect(path, timeout=5)) as connection:
        connection.execute(COUNT_WRITE).fetchone()


def first_cause(error: Exception) -> Exception:
    """The error that made SQLite undo all, where an inner transaction finds nothing to undo."""
    while 'no such savepoint' in str(error) and isinstance(error.__context__, BaseException):
        error = error.__context__
    return error


#: What keeps in memory what transactions have decided: `mark` tells how much that is, `back` makes
#: it as little again, `write` writes it, and `forget` forgets it.
MEMORIES: list = []


@contextmanager
def transaction(first: bool = False) -> Iterator[None]:
    """All of it or nothing, on disk when it ends; a part of the transaction or rehearsal around it.

    Args:
      first: before all others of this process that wait
    """
    if db.in_transaction():
        with Attempt():
            yield
            write_memories()
        return
    began = time.monotonic()
    if not turns.acquire(PATIENT, first):
        raise Unavailable(TROUBLES[sqlite3.SQLITE_BUSY])
    try:
        METRICS.observe('lock_wait_seconds', time.monotonic() - began)
        with watched():
            try:
                yield
                write_memories()
            finally:
                forget_memories()
    except STORE_ERRORS as error:
        raise of_store(error)
    finally:
        turns.release()


def some_of(left: deque) -> Iterator:
    """Takes one by one what is left, until a transaction has lasted for as long as a piece may."""
    until = time.monotonic() + PIECE
    while left:
        yield left.popleft()
        if time.monotonic() >= until:
            return


@contextmanager
def watched() -> Iterator[None]:
    """A transaction that writes to the files that cmres has opened, or not at all."""
    store_file.check()
    number = 0
    with db.atomic():
        before = db.connection().total_changes
        yield
        if db.connection().total_changes > before:
            number = int(run(COUNT_WRITE).fetchone()[0])
            store_file.confirm()
    if number:
        store_file.acknowledge(number)


#: Each write has a number, by which a database file tells how old it is.
LAST_WRITE = "SELECT CAST(value AS INTEGER) FROM fact WHERE name = 'writes'"
COUNT_WRITE = """INSERT INTO fact (name, value) VALUES ('writes', 1)
  ON CONFLICT (name) DO UPDATE SET value = value + 1 RETURNING value"""


def of_store(error: Exception) -> Exception:
    """The first cause of an error, after which this thread may go on."""
    cause = first_cause(error)
    # A connection that was opened while nothing could be written stays so: the next is a new one.
    if code_of(sqlite_error(cause)) == sqlite3.SQLITE_READONLY and not db.in_transaction():
        db.close()
    return cause


def write_memories() -> None:
    """Makes true what was decided so far; in a rehearsal nothing is."""
    for memory in () if rehearsal.on else MEMORIES:
        memory.write()


def forget_memories() -> None:
    for memory in MEMORIES:
        memory.forget()


# A rehearsal decides and answers what a transaction would, upon the store as it is at one instant,
# and nothing of it ever happens. It takes no lock: what it writes goes to tables of its own, in
# memory and on this connection alone. From its first write to a table on, its statements read and
# write instead of that the view NAME_now: the rows of the table without those in NAME_gone, and
# those in NAME_new. So a deed and its rehearsal are one program.

class Rehearsal(threading.local):
    """What this thread rehearses: to which tables it has written, and the next ids there."""
    tables: frozenset | None = None
    ids: dict = {}

    @property
    def on(self) -> bool:
        return self.tables is not None


class Unmade(Exception):
    """Ends a rehearsal."""


rehearsal = Rehearsal()
#: What operations change, each with what changes with it.
REHEARSED = dict.fromkeys(('occurrence', 'resource', 'capacity', 'proposal', 'extra_hold', 'wait',
                           'limits', 'token', 'feed', 'subscription'), ()) | {
    'reservation': ('occurrence', 'texts')}
WRITTEN = re.compile(r'\s*(?:INSERT INTO|UPDATE|DELETE FROM)\s+(\w+)')
NAMED = re.compile(r'\b((?:FROM|JOIN|INTO|UPDATE)\s+)(\w+)\b')
INDEXED = re.compile(r'\b((?:FROM|JOIN|UPDATE)\s+(\w+)(?:\s+\w+)?)\s+INDEXED BY \w+')


@contextmanager
def rehearsing() -> Iterator[None]:
    """A transaction of which nothing is kept, and that nobody waits for; or so much of one."""
    if db.in_transaction():
        with undone():
            yield
        return
    store_file.check()
    try:
        set_stage()
        with suppress(Unmade), db.atomic('DEFERRED'):
            rehearsal.tables, rehearsal.ids = frozenset(), {}
            try:
                yield
            finally:
                rehearsal.tables = None
                forget_memories()
            raise Unmade
    except STORE_ERRORS as error:
        raise of_store(error)


def set_stage() -> None:
    """Makes, once on each connection, what rehearsals write to."""
    if run('PRAGMA temp.table_info(texts_now)').fetchone():
        return
    run('PRAGMA temp_store = memory')
    for table in REHEARSED:
        columns = run(f'PRAGMA main.table_info({table})').fetchall()
        names = ', '.join(f'"{name}"' for _, name, *_ in columns)
        kinds = ', '.join(f'"{name}" {kind} {"NOT NULL" if needed else ""}'
                          f'{" PRIMARY KEY" if key else f" DEFAULT {default}" if default else ""}'
                          for _, name, kind, needed, default, key in columns)
        news = ', '.join(f'NEW."{name}"' for _, name, *_ in columns)
        owner = """UPDATE occurrence_now SET of_project = NEW.project, of_user = NEW.user WHERE
          reservation_id = NEW.id AND (NEW.project, NEW.user) <> (OLD.project, OLD.user);"""
        run_all(f"""
          CREATE TEMP TABLE {table}_new ({kinds});
          CREATE TEMP TABLE {table}_gone (id INTEGER PRIMARY KEY);
          CREATE TEMP VIEW {table}_now AS
            SELECT {names} FROM main.{table} WHERE id NOT IN (SELECT id FROM {table}_gone)
            UNION ALL SELECT {names} FROM {table}_new""")
        run(f"""CREATE TEMP TRIGGER {table}_changed INSTEAD OF UPDATE ON {table}_now BEGIN
          INSERT OR REPLACE INTO {table}_new VALUES ({news});
          INSERT OR IGNORE INTO {table}_gone VALUES (OLD.id);
          {owner if table == 'reservation' else ''} END""")
        run(f"""CREATE TEMP TRIGGER {table}_dropped INSTEAD OF DELETE ON {table}_now BEGIN
          DELETE FROM {table}_new WHERE id = OLD.id;
          INSERT OR IGNORE INTO {table}_gone VALUES (OLD.id); END""")
    run(f"""CREATE TEMP VIEW texts_now AS
      SELECT project, sum(size) AS size FROM (
        SELECT project, size FROM main.texts UNION ALL
        SELECT project, {long_texts('n')} FROM reservation_new n WHERE {long_texts('n')} > 1000
        UNION ALL SELECT project, -{long_texts('g')} FROM main.reservation g
         WHERE id IN (SELECT id FROM reservation_gone) AND {long_texts('g')} > 1000) GROUP BY 1""")


def rehearsed(sql: str) -> str:
    """A statement as this thread's rehearsal runs it."""
    if written := WRITTEN.match(sql):
        note_written(written[1])
    return rehearsed_text(sql, rehearsal.tables) if rehearsal.tables else sql


def note_written(table: str) -> None:
    """From now on what this thread's rehearsal has of a table is not what the store has."""
    if table not in REHEARSED:
        raise RuntimeError(f'{table} would be written to in a rehearsal')
    rehearsal.tables |= {table, *REHEARSED[table]}


@functools.lru_cache(1000)
def rehearsed_text(sql: str, tables: frozenset) -> str:
    sql = INDEXED.sub(lambda found: found[found[2] in tables], sql)
    return NAMED.sub(lambda found: f'{found[0]}_now' if found[2] in tables else found[0], sql)


def rehearsed_id(table: str) -> int:
    """The id that the next new row of a table would have."""
    if table not in rehearsal.ids:
        rehearsal.ids[table] = run(f'SELECT coalesce(max(id), 0) FROM main.{table}').fetchone()[0]
    rehearsal.ids[table] += 1
    return rehearsal.ids[table]


class Attempt:
    """A part of a transaction that is done as a whole, or undone: where it fails, or is told so."""

    def __enter__(self):
        self.marks, self.ids = [memory.mark() for memory in MEMORIES], {**rehearsal.ids}
        run('SAVEPOINT attempt')
        return self

    def undo(self) -> None:
        """Makes all as it was before; what comes then is a part of the attempt as well."""
        run('ROLLBACK TO attempt')
        rehearsal.ids = self.ids.copy()
        for memory, mark in zip(MEMORIES, self.marks):
            memory.back(mark)

    def __exit__(self, kind, error, trace) -> None:
        if kind:
            self.undo()
        run('RELEASE attempt')


@contextmanager
def undone() -> Iterator[None]:
    """A part of a transaction of which nothing is kept."""
    with Attempt() as attempt:
        yield
        attempt.undo()


def run(sql: str, *values) -> sqlite3.Cursor:
    """Runs one statement on this thread's connection, with peewee's kinds of errors."""
    return execute(rehearsed(sql) if rehearsal.on else sql, values)


def execute(sql: str, values: Iterable = ()) -> sqlite3.Cursor:
    """Runs one statement as it stands."""
    try:
        return db.connection().execute(sql, values)
    except sqlite3.Error as error:
        raise getattr(peewee, type(error).__name__)(*error.args) from error


def rows(sql: str, *values) -> list:
    """All rows of a query, as named tuples."""
    cursor = run(sql, *values)
    try:
        return list(map((ROW_TYPES.get(sql) or row_type(sql, cursor))._make, cursor))
    except sqlite3.Error as error:  # a later row may be on a damaged page
        raise getattr(peewee, type(error).__name__)(*error.args) from error


def row(sql: str, *values):
    """The first row of a query, or None."""
    found = rows(sql, *values)
    return found[0] if found else None


ROW_TYPES: dict = {}


class Remembered(threading.local):
    """What this thread's transaction has read of what it seldom writes to."""

    def __init__(self):
        self.found: dict = {}
        self.written = False  # to what it remembers, since it began

    def mark(self) -> None:
        """Nothing: what was read before an attempt and in it is the same."""

    def back(self, mark: None) -> None:
        if self.written:
            self.found.clear()

    def write(self) -> None:
        """Nothing is decided here."""

    def forget(self) -> None:
        self.__init__()

    def change(self) -> None:
        """Reads all anew, since something was written."""
        self.found.clear()
        self.written = True


remembered = Remembered()
MEMORIES.append(remembered)
SELDOM = ('resource', 'limits', 'wait')
STANDING = """SELECT EXISTS (SELECT 1 FROM wait) AS waits,
                     EXISTS (SELECT 1 FROM limits) AS limits"""


def once(sql: str, *values) -> list:
    """All rows of a query on SELDOM, which a transaction asks once until it writes there."""
    if not db.in_transaction():
        return rows(sql, *values)
    key = sql, values
    if key not in remembered.found:
        remembered.found[key] = rows(sql, *values)
    return remembered.found[key]


def standing():
    """Whether anybody waits, and whether anybody is limited, at all: `waits` and `limits`."""
    return once(STANDING)[0]


def resource_of(id: int, removed: bool = False):
    """The row of a resource; None if it was removed."""
    found = once('SELECT * FROM resource WHERE id = ?', id)[0]
    return found if removed or found.removed is None else None


def state_of_store() -> tuple:
    """What is another as soon as anything was written, by this connection or by another one."""
    connection = db.connection()
    return id(connection), connection.total_changes, run('PRAGMA data_version').fetchone()[0]


def row_type(sql: str, cursor):
    if len(ROW_TYPES) > 500:  # queries with lists of filters come in many forms
        ROW_TYPES.clear()
    ROW_TYPES[sql] = namedtuple('Row', [column[0] for column in cursor.description])
    return ROW_TYPES[sql]


def insert(model: type[Table], **values) -> int:
    """Writes a row and tells its id."""
    if model._meta.table_name in SELDOM:
        remembered.change()
    if not rehearsal.on:
        return run(insert_text(model, tuple(values)), *values.values()).lastrowid
    table = model._meta.table_name
    note_written(table)
    values['id'] = rehearsed_id(table)
    execute(insert_text(model, tuple(values), '_new'), (*values.values(),))
    return values['id']


@functools.lru_cache
def insert_text(model, names: tuple, instead: str = '') -> str:
    columns = ', '.join(f'"{model._meta.fields[name].column_name}"' for name in names)
    marks = ', '.join('?' * len(names))
    return f'INSERT INTO {model._meta.table_name}{instead} ({columns}) VALUES ({marks})'


def insert_many(model: type[Table], many: list[dict]) -> None:
    """Writes rows in one statement, in order; what some don't have is NULL."""
    if len(many) == 1:
        insert(model, **many[0])
        return
    table, names = model._meta.table_name, (*dict.fromkeys(name for each in many for name in each),)
    if rehearsal.on:
        note_written(table)
        names = ('id', *names)
        many = [{'id': rehearsed_id(table), **each} for each in many]
    if many:
        execute(insert_many_text(model, names, '_new' if rehearsal.on else ''), (json.dumps(
            [[each.get(name) for name in names] for each in many]),))


@functools.lru_cache
def insert_many_text(model, names: tuple, instead: str) -> str:
    columns = ', '.join(f'"{model._meta.fields[name].column_name}"' for name in names)
    values = ', '.join(f"json_extract(value, '$[{n}]')" for n, _ in enumerate(names))
    return (f'INSERT INTO {model._meta.table_name}{instead} ({columns}) '
            f'SELECT {values} FROM json_each(?) ORDER BY key')


def change(model: type[Table], id: int, **values) -> None:
    """Writes some columns of one row."""
    if model._meta.table_name in SELDOM:
        remembered.change()
    run(change_text(model, tuple(values)), *values.values(), id)


@functools.lru_cache
def change_text(model, names: tuple, more: str = '') -> str:
    columns = ', '.join(f'"{model._meta.fields[name].column_name}" = ?' for name in names)
    return f'UPDATE {model._meta.table_name} SET {columns}{more} WHERE id = ?'


def change_occurrence(id: int, now: float, **values) -> None:
    """Writes some columns of an occurrence, which is another one for calendars then."""
    values['revised'] = int(now)
    run(change_text(Occurrence, tuple(values), ', revision = revision + 1'), *values.values(), id)


def journal(config: Config, at: float, actor: str, code: str, sentence: str,
            reservation: int | None = None, notify: Iterable[str] | None = (),
            occurrence: int | None = None, **refused) -> None:
    """Appends an event, and the notices of it; inside the transaction of what it tells.

    Args:
      notify: who hears of it beside the operator's webhook; None: nobody, it is only logged
      occurrence: the one that it is about; without one, all that are not over
      refused: project, and id of the resource, of what is no reservation
    """
    if rehearsal.on:
        return
    about = {'reservation': reservation, 'occurrence': occurrence, 'project': '',
             'resource': None} | refused
    event = write_event(at, actor, code, sentence, about)
    if reservation and (occurrence is None or occurrence > 0):
        by, which, id = ('', 'id', occurrence) if occurrence else (
            'INDEXED BY occurrence_series', '(due IS NULL) = 0 AND reservation_id', reservation)
        run(f'UPDATE occurrence {by} SET revision = revision + 1, revised = ? WHERE {which} = ?',
            int(at), id)
    if code not in TEXTS or notify is None:
        return
    if config.webhook:
        send_later(event, [config.webhook], '', at)
    targets = [target for target in notify if config.may_tell(target)]
    tell_owners(config, event, targets, about, actor, at)


def write_event(at: float, actor: str, code: str, sentence: str, about: dict) -> int:
    """Appends an event; one of a reservation is of its project."""
    return run('INSERT INTO event (at, actor, code, sentence, reservation_id, occurrence, project, '
               'resource_id) SELECT ?1, ?2, ?3, ?4, ?5, ?6, '
               'coalesce((SELECT project FROM reservation WHERE id = ?5), ?7), ?8',
               at, actor, code, sentence, *(about[name] for name in (
                   'reservation', 'occurrence', 'project', 'resource'))).lastrowid


def tell_owners(config: Config, event: int, targets: list[str], about: dict, actor: str,
                at: float) -> None:
    """Writes down the notices of an event for its owner; as many mails as a day may have."""
    if not targets:
        return
    owner = owner_of(about['reservation']) or f"{about['project']}/{actor}"
    mails = [target for target in targets if not is_web(target)]
    left = mails_left(config, owner, len(mails), at) if mails else 0
    may_go = mails[:max(left, 0)]
    send_later(event, [target for target in targets if is_web(target)] + may_go, owner, at)
    if 0 <= left < len(mails):
        tomorrow = config.told_time((at // 86400 + 1) * 86400)
        last = write_event(at, 'cmres', 'dropped', (
            f'{config.notices_per_day} mails were sent for {owner} today, so no more are sent '
            f'until {tomorrow}; the event log has everything'), about)
        send_later(last, mails, owner, at)


def owner_of(reservation: int | None) -> str:
    """Whose a reservation is, as PROJECT/USER."""
    found = row("SELECT project || '/' || user AS owner FROM reservation WHERE id = ?", reservation)
    return found.owner if found else ''


def mails_left(config: Config, owner: str, number: int, at: float) -> int:
    """How many of some mails may be sent for somebody today; -1: none, which was told already."""
    total, = run('INSERT INTO mailed (owner, day, number) VALUES (?, ?, ?) '
                 'ON CONFLICT (owner) DO UPDATE SET day = excluded.day, '
                 'number = excluded.number + iif(day = excluded.day, number, 0) RETURNING number',
                 owner, int(at // 86400), number).fetchone()
    left = config.notices_per_day - (total - number)
    return -1 if left < 0 else min(left, number)


def send_later(event: int, targets: list[str], owner: str, at: float) -> None:
    for target in targets:
        insert(Outbox, event=event, target=target, owner=owner, due=at, tries=0, fault='')


# What a reservation looks like to everybody: its occurrence's facts and the state derived from
# them. A state is never stored, so it can't be stale: it follows from the clock and from what was
# seen of the servers. The parameter ?1 is the instant for which the state is asked.

LISTING = '''
  SELECT o.id, r.id AS reservation, r.label, r.user, r.project,
         s.name AS resource, s.cell, s.cloud, s.region, s.aggregate,
         o.vms, r.flavor, r.image, r.network, r.key, r.security_groups, r.metadata, r.user_data,
         r.server, r.at_end, r.notify, o.vcpus, o.ram, o.classes, r.lead, r.description, r.personal,
         r.repeat, r.tz, o.start, o."end", o.cancelled, r.added, r.changed,
         (SELECT count(*) FROM server v
           WHERE v.occurrence_id = o.id AND v.goal = 'up' AND v.state = 'active') AS up,
         (SELECT v.fault FROM server v WHERE v.occurrence_id = o.id AND v.goal = 'up'
           AND v.fault <> ''
           ORDER BY v.n LIMIT 1) AS fault,
         (SELECT count(*) FROM server v
           WHERE v.occurrence_id = o.id AND v.state NOT IN ('deleted', 'kept')) AS existing,
         (SELECT count(*) FROM server v WHERE v.occurrence_id = o.id
           AND v.ready IS NOT NULL) AS ever,
         (r.image <> '' OR r.server <> '') AS runs,
         CAST(?1 AS INTEGER) AS now, o.told, o.held_from, o.held_until, o.resource_id, r.over,
         o.due, o.slot, o.altered, o.revision, o.revised, r.waiting,
         r.priority, r.confirm, r.pending, r.on_conflict, r.booked_until, r.subscription,
         r.series <> '' AS repeats, iif(r.repeat <> '', r.series, '') AS series, r.request, r.host,
         r.choices, r.trusted,
         (SELECT p.shown FROM proposal p WHERE p.reservation_id = r.id AND (p.occurrence = o.id
           OR NOT p.alone)
           ORDER BY p.id DESC LIMIT 1) AS change
    FROM occurrence o
    JOIN reservation r ON r.id = o.reservation_id JOIN resource s ON s.id = o.resource_id'''

#: In a list long texts are left out or cut: they are for who asks for one reservation.
BRIEF = LISTING.replace('r.user_data,', "'' AS user_data,").replace(
    'r.description,',
    "iif(length(r.description) > 200, substr(r.description, 1, 197) || '...', r.description) "
    'AS description,')

STATE = '''
  CASE WHEN cancelled IS NOT NULL THEN CASE WHEN existing > 0 THEN 'ending' ELSE 'cancelled' END
       WHEN waiting IS NOT NULL THEN CASE WHEN now < "end" THEN 'waiting' ELSE 'cancelled' END
       WHEN pending IS NOT NULL AND now < "end" OR change IS NOT NULL AND now < held_from
         THEN 'pending'
       WHEN now < held_from OR NOT runs AND now < start THEN 'reserved'
       WHEN NOT runs THEN CASE WHEN now < "end" THEN 'active' ELSE 'ended' END
       WHEN now >= "end" THEN CASE WHEN existing > 0 THEN 'ending' WHEN ever > 0 THEN 'ended'
         ELSE 'failed' END
       WHEN up >= vms THEN 'active' WHEN up > 0 THEN 'degraded' ELSE 'starting' END'''

STATES = ('waiting', 'pending', 'reserved', 'starting', 'active', 'degraded', 'ending', 'ended',
          'cancelled', 'failed')


def listing(now: float, where: str = '1', values: tuple = (), state: str = '1', tail: str = '',
            fields: str = LISTING) -> list:
    """Occurrences with reservation and state, by conditions on o, r and s, then on the state."""
    return rows(f'SELECT * FROM (SELECT *, {STATE} AS state FROM ({fields} WHERE {where})) WHERE '
                f'{state} {tail}', int(now), *values)


#: What is held before an instant starts at most so much after it; leads are few, and an index knows
#: the longest.
LONGEST_LEAD = '(SELECT coalesce(max(lead), 0) FROM reservation WHERE lead > 0)'


def walk(now: float, ways: Iterable[tuple[str, str]], where: list, limit: int,
         latest: bool = False) -> list[tuple[int, int]]:
    """The first occurrences, (start, id), in that order, by indexes that are in that order already.

    Args:
      ways: the ORDERS to go by, each with a condition; they are merged
      where: conditions on o, each with the values of its parameters
    """
    count = itertools.count(2)
    common = all_of(where)
    # they stand in the text once for each way
    common = re.sub(r'\?(?!1\b)', lambda _: f'?{next(count)}', common)
    ones = ' UNION '.join(f'SELECT o.start, o.id FROM occurrence o INDEXED BY occurrence_{way} '
                          f'WHERE {condition}{common}' for way, condition in ways)
    order = 'DESC' if latest else 'ASC'
    return run(f'{ones} ORDER BY 1 {order}, 2 {order} LIMIT {limit}', int(now),
               *given(where)).fetchall()


def ids_by(ways: Iterable[tuple[str, str]]) -> str:
    """The query of the ids of occurrences by some ORDERS, with conditions without parameters."""
    return ' UNION ALL '.join(f'SELECT o.id FROM occurrence o INDEXED BY occurrence_{way} WHERE '
                              f'{condition}' for way, condition in ways)


def all_of(where: list) -> str:
    """Conditions, as `given` takes them, behind another one."""
    return ''.join(f' AND {text}' for text, *_ in where)


def given(where: list) -> list:
    """The values of the parameters of conditions; None is behind a text without one."""
    return [value for _, *values in where for value in values if value is not None]


# Capacity ####################################################################
#
# THE RULE. An occurrence holds an amount (vms, vcpus, ram) of its resource during the half-open
# window [held_from, held_until). It is admitted if, at every instant of that window, what is held
# already plus what it asks for stays within the resource's capacity.
#
# A change first gives back what it holds no more (`beyond` of the old and the new), keeps held what
# it keeps, and takes only what it wants more. Of several changes all give back first, then each
# takes in turn: so a chain of moves goes through, and nobody takes what another still has.
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
# There is one such function of the three figures, and one of each other resource class of Placement
# that is counted, such as CUSTOM_GPU: a track each, and (1) to (3) are said of every track. A
# maintenance holds one of the track CLOSED, of which no resource has any: so nothing is admitted in
# it, also where a resource has no figure that could be used up.
#
# A transaction keeps what it holds and gives back in memory, the ledger, and writes the net at its
# end: so what is undone costs nothing, and a rehearsal writes nothing.
#
# Cost: a few index look-ups and one row per change of level inside the window, whatever the number
# of reservations. `check` derives the same function from the occurrences and compares.

class Amount(NamedTuple):
    """Something held or asked for; also a level, and with None for unlimited a capacity."""
    vms: int = 0
    vcpus: int = 0
    ram: int = 0
    # (name, figure) of Placement's other resource classes, by name; none with nothing
    classes: tuple = ()

    def __add__(self, other): return Amount(*(a + b for a, b in zip(self[:3], other)),
                                            added(self, other, 1))

    def __sub__(self, other): return Amount(*(a - b for a, b in zip(self[:3], other)),
                                            added(self, other, -1))

    def __mul__(self, factor: int):
        return Amount(*(each * factor for each in self[:3]),
                      tuple((name, n * factor) for name, n in self.classes if n * factor))

    def __floordiv__(self, parts: int):
        return Amount(*(each // parts for each in self[:3]),
                      tuple((name, n // parts) for name, n in self.classes if n // parts))

    def within(self, capacity) -> bool:
        return all(most is None or each <= most for each, most in zip(self[:3], capacity)) and all(
            capacity.most(name) is None or each <= capacity.most(name)
            for name, each in self.classes)

    def most(self, name: str) -> int | None:
        """Of a capacity, a class; what isn't told is unlimited, each host is there once."""
        known = {CLOSED: 0} | dict(self.classes)
        return known.get(name, 1 if name.startswith(HOST) else known.get(OTHERS))

    def beyond(self, other):
        """What is more of it than in another amount."""
        return Amount(*(max(a - b, 0) for a, b in zip(self[:3], other)),
                      tuple(each for each in added(self, other, -1) if each[1] > 0))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.classes if name not in (OTHERS, CLOSED)]

    @property
    def tracks(self) -> Iterator[tuple[str, tuple]]:
        """The step functions that it is a part of: of the three figures, and of each class."""
        if any(self[:3]):
            yield '', self[:3]
        for name, each in self.classes:
            if each:
                yield name, (each, 0, 0)


FIGURES = Amount._fields[:3]
NOTHING = Amount()
OTHERS = '*'    # of a capacity, all classes that are not told
CLOSED = '!'    # the track in which a maintenance holds one
HOST = 'host:'  # begins the class of a host that is reserved by its name


def added(one: Amount, other: Amount, sign: int) -> tuple:
    """The classes of a sum."""
    if not other.classes:
        return one.classes
    sums = dict(one.classes)
    for name, each in other.classes:
        sums[name] = sums.get(name, 0) + sign * each
    return tuple(sorted((name, each) for name, each in sums.items() if each))


class Hold(NamedTuple):
    """An amount of a resource that is held during [begin, until)."""
    resource: int  # id
    begin: int
    until: int
    amount: Amount


def hold_of(row) -> Hold:
    """What the row of an occurrence, or another one with its columns, holds."""
    return Hold(row.resource_id, row.held_from, row.held_until, amount_of(row))


def beyond(some: list[Hold], others: list[Hold]) -> list[Hold]:
    """What some holds have in all that others have not, in pieces that don't overlap."""
    if not others and len(some) == 1 and some[0].begin < some[0].until:  # as most are
        return some
    return [piece for resource in dict.fromkeys(each.resource for each in some)
            for piece in beyond_at(resource, some, others)]


def beyond_at(resource: int, *sides: list[Hold]) -> Iterator[Hold]:
    """The pieces of one resource, in order: what the first side has more of than the second."""
    changes: dict[int, list] = defaultdict(lambda: [NOTHING, NOTHING])
    for side, holds in enumerate(sides):
        for each in holds:
            if each.resource == resource:
                changes[each.begin][side] += each.amount
                changes[each.until][side] -= each.amount
    has = had = NOTHING
    for begin, until in itertools.pairwise(sorted(changes)):
        more, there = changes[begin]
        has, had = has + more, had + there
        if (growth := has.beyond(had)) != NOTHING:
            yield Hold(resource, begin, until, growth)


def amount_of(row, prefix: str = '') -> Amount:
    """What an occurrence, a resource or another row holds."""
    vms, vcpus, ram, classes = (getattr(row, prefix + name) for name in Amount._fields)
    return Amount(vms, vcpus, ram, tuple(sorted(json.loads(classes).items())) if classes else ())


def of_columns(columns: dict) -> Amount:
    """The amount that `stored` has made columns of."""
    return Amount(*(columns[name] for name in FIGURES),
                  tuple(json.loads(columns['classes'] or '{}').items()))


def capacity(resource) -> Amount:
    """What the row of a resource holds; of what Placement has not told for its hosts, nothing."""
    most = amount_of(resource)
    return (most if resource.hosts in ('', '[]')
            else most._replace(classes=(*most.classes, (OTHERS, 0))))


def stored(amount: Amount, prefix: str = '') -> dict:
    """An amount as the columns of a row."""
    return {prefix + name: each for name, each in zip(FIGURES, amount)} | {
        f'{prefix}classes': json.dumps(dict(amount.classes)) if amount.classes else ''}


class Profile:
    """What is held more of one track from each of some instants on, as figures of steps."""

    def __init__(self):
        self.ats, self.levels = [], []

    def add(self, begin: int, until: int, figures: tuple) -> None:
        first, last = self.cut(begin), self.cut(until)
        for n in range(first, last):
            self.levels[n] = plus(self.levels[n], figures)

    def cut(self, at: int) -> int:
        """Where an instant stands among the cuts; it is one from now on."""
        n = bisect_left(self.ats, at)
        if n == len(self.ats) or self.ats[n] != at:
            self.ats.insert(n, at)
            self.levels.insert(n, self.level(n - 1))
        return n

    def level(self, n: int) -> tuple:
        return self.levels[n] if n >= 0 else ZERO

    def at(self, instant: float) -> tuple:
        return self.level(bisect_right(self.ats, instant) - 1)

    def within(self, begin: float, until: float) -> Iterator[tuple[float, float, tuple]]:
        """A window in pieces, each with what is held more in all of it."""
        n = bisect_right(self.ats, begin)
        cuts = [begin, *self.ats[n:bisect_left(self.ats, until)], until]
        for number, (first, last) in enumerate(itertools.pairwise(cuts), n - 1):
            yield first, last, self.level(number)

    def pieces(self) -> Iterator[tuple[int, int, tuple]]:
        """All of it that isn't nothing."""
        for (begin, level), until in zip(zip(self.ats, self.levels), self.ats[1:]):
            if level != ZERO:
                yield begin, until, level


ZERO = (0, 0, 0)


def plus(some: tuple, others: tuple) -> tuple:
    return tuple(map(int.__add__, some, others))


class Ledger(threading.local):
    """What this thread's transaction holds and gives back, until the net is written as steps."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        self.entries = []  # (resource, track, begin, until, figures), in order
        self.written = 0   # so many of them are steps already
        self.profiles: dict[tuple[int, str], Profile] = {}  # the sum of the others
        self.peaks: dict[tuple, list] = {}  # what was read of windows, and around cuts
        self.cuts: dict[tuple, tuple] = {}

    def mark(self) -> tuple[int, int]:
        return len(self.entries), self.written

    def back(self, mark: tuple[int, int]) -> None:
        """Forgets what came after a mark; what was written since is no more, either."""
        if mark == self.mark():
            return
        number, written = mark
        kept, read = self.entries[:number], (self.peaks, self.cuts)
        same = self.written == written
        self.forget()
        self.entries, self.written = kept[:written], written
        if same:
            self.peaks, self.cuts = read
        for entry in kept[written:]:
            self.add(*entry)

    def add(self, *entry) -> None:
        self.entries.append(entry)
        resource, track, *change = entry
        if (resource, track) not in self.profiles:
            self.profiles[resource, track] = Profile()
        self.profiles[resource, track].add(*change)

    def within(self, resource: int, track: str, begin: float, until: float) -> list[tuple]:
        """A window in pieces, each with what this transaction holds more in all of it."""
        found = self.profiles.get((resource, track))
        return [*found.within(begin, until)] if found else [(begin, until, ZERO)]

    def after(self, resource: int, track: str, instant: float) -> int | None:
        """The next instant at which it is another amount."""
        found = self.profiles.get((resource, track))
        return next((at for at in found.ats if at > instant), None) if found else None

    def at(self, resource: int, track: str, instant: float) -> tuple:
        found = self.profiles.get((resource, track))
        return found.at(instant) if found else ZERO

    def read(self, pieces: Iterable[tuple]) -> None:
        """Reads what `step` has of windows, (resource, track, begin, until), that were not read."""
        if len(self.peaks) > MOST_WINDOWS:
            self.peaks, self.cuts = {}, {}
        missing = [piece for piece in dict.fromkeys(pieces) if piece not in self.peaks]
        if not missing:
            return
        for piece, found in zip(missing, run(PEAKS, json.dumps(missing)).fetchall()):
            at, before, inside, *ended = map(step_of, found)
            resource, track, begin, until = piece
            self.peaks[piece] = [at or before or ZERO, *([inside] if inside else [])]
            self.cuts[resource, track, begin] = at, before
            self.cuts[resource, track, until] = ended

    def peak(self, resource: int, track: str, begin: float, until: float) -> tuple:
        """The peak of a track in a window that was read, with what this transaction holds."""
        held = [plus(level, more)
                for first, last, more in self.within(resource, track, begin, until)
                for level in self.peaks[resource, track, first, last]]
        return tuple(map(max, *held)) if len(held) > 1 else held[0]

    def write(self) -> None:
        """Writes the net of what was held and given back."""
        pieces = [(*of, *piece) for of, each in self.profiles.items() for piece in each.pieces()]
        if pieces:
            write_steps(pieces)
        self.written, self.profiles, self.peaks, self.cuts = len(self.entries), {}, {}, {}


MOST_WINDOWS = 5000  # windows of which a transaction remembers what is held


ledger = Ledger()
MEMORIES.append(ledger)
def of_list(query: str, *names: str) -> str:
    """A query that uses lists, its one parameter in JSON, as the rows of a table p."""
    columns = ', '.join(f"json_extract(value, '$[{n}]') AS {name}" for n, name in enumerate(names))
    return f'WITH p AS MATERIALIZED (SELECT key, {columns} FROM json_each(?)) {query}'


OF_ITS = 'step.resource_id = p.resource AND step.track = p.track'  # steps of the step function of p
#: The step at an instant of p if there is one, and the one before it.
AROUND = f"""(SELECT json_array(vms, vcpus, ram) FROM step WHERE {OF_ITS} AND at = p.{{0}}),
             (SELECT json_array(vms, vcpus, ram) FROM step WHERE {OF_ITS} AND at < p.{{0}}
               ORDER BY at DESC LIMIT 1)"""
INSIDE = f'FROM step WHERE {OF_ITS} AND at > p.begun AND at < p.until'
STEPS_AT = of_list(f"SELECT {AROUND.format('at')} FROM p ORDER BY key", 'resource', 'track', 'at')
PEAKS = of_list(f"""
  SELECT {AROUND.format('begun')},
         (SELECT iif(max(vms) IS NULL, NULL, json_array(max(vms), max(vcpus), max(ram))) {INSIDE}),
         {AROUND.format('until')} FROM p ORDER BY key""", 'resource', 'track', 'begun', 'until')
PUT_STEPS = of_list("""
  INSERT INTO step (resource_id, track, at, vms, vcpus, ram)
  SELECT resource, track, at, a, b, c FROM p WHERE 1
      ON CONFLICT DO UPDATE SET vms = excluded.vms, vcpus = excluded.vcpus, ram = excluded.ram""",
                    'resource', 'track', 'at', 'a', 'b', 'c')
RAISE_STEPS = of_list(f"""
  UPDATE step SET vms = vms + p.a, vcpus = vcpus + p.b, ram = ram + p.c FROM p
   WHERE {OF_ITS} AND at > p.begun AND at < p.until""",
                      'resource', 'track', 'begun', 'until', 'a', 'b', 'c')
DROP_STEPS = of_list('DELETE FROM step WHERE (resource_id, track, at) IN '
                     '(SELECT resource, track, at FROM p)', 'resource', 'track', 'at')


def step_of(text: str | None) -> tuple | None:
    """The figures of a step that was read as JSON."""
    return tuple(json.loads(text)) if text else None


def write_steps(pieces: list[tuple]) -> None:
    """(3): holds more in pieces that don't overlap: (resource, track, begin, until, figures)."""
    begun = {tuple(piece[:3]): piece for piece in pieces}
    ended = {(resource, track, until): figures for resource, track, _, until, figures in pieces}
    cuts = sorted(begun.keys() | ended.keys())
    unknown = [cut for cut in cuts if cut not in ledger.cuts]
    found = run(STEPS_AT, json.dumps(unknown)).fetchall() if unknown else ()
    ledger.cuts |= zip(unknown, ([*map(step_of, each)] for each in found))
    put, gone = [], []
    for cut in cuts:
        at, before = ledger.cuts[cut]
        new = plus(at or before or ZERO, begun[cut][4] if cut in begun else ZERO)
        if new == plus(before or ZERO, ended.get(cut, ZERO)):
            gone += [cut] if at else []
        elif new != at:
            put.append((*cut, *new))
    inside = [(*piece[:4], *piece[4]) for piece in pieces
              if len(ledger.peaks.get(piece[:4], (0, 0))) > 1]
    for statement, values in (RAISE_STEPS, inside), (PUT_STEPS, put), (DROP_STEPS, gone):
        if values:
            run(statement, json.dumps(values))


def level(resource: int, at: float, classes: Iterable[str] = ()) -> Amount:
    """(1), also of some classes."""
    found = ((name, level_of(resource, name, at)[0]) for name in classes)
    return Amount(*level_of(resource, '', at), tuple(each for each in found if each[1]))


def level_of(resource: int, track: str, at: float) -> tuple[int, ...]:
    return plus(written_level(resource, track, at), ledger.at(resource, track, at))


def written_level(resource: int, track: str, at: float) -> tuple[int, ...]:
    return run('SELECT vms, vcpus, ram FROM step WHERE resource_id = ? AND track = ? AND at <= ? '
               'ORDER BY at DESC LIMIT 1', resource, track, at).fetchone() or ZERO


def peak(resource: int, begin: float, until: float, classes: Iterable[str] = ()) -> Amount:
    """(2), each figure on its own; with CLOSED, where a resource is closed."""
    tracks = ('', CLOSED, *classes)
    ledger.read((resource, track, *piece[:2]) for track in tracks
                for piece in ledger.within(resource, track, begin, until))
    found = {track: ledger.peak(resource, track, begin, until) for track in tracks}
    closed = found[CLOSED][0]
    if not db.in_transaction():
        ledger.forget()
    return Amount(*found[''], (*(((CLOSED, closed),) if closed else ()),
                               *((name, found[name][0]) for name in classes)))


def read_windows(holds: Iterable[Hold], now: float) -> None:
    """Reads at once what is held where some holds would be taken."""
    ledger.read((each.resource, track, *piece[:2]) for each in holds if each.until > now
                for track in ('', CLOSED, *each.amount.names)
                for piece in ledger.within(each.resource, track, max(each.begin, int(now)),
                                           each.until))


def hold(resource: int, begin: int, until: int, amount: Amount) -> None:
    """(3), without asking whether it fits; what is given back by it is there at once."""
    tracks = [*amount.tracks] if begin < until else []
    for track, figures in tracks:
        ledger.add(resource, track, begin, until, figures)
    # At once: who is first of those that wait must not be passed in this very transaction.
    if any(each < 0 for _, figures in tracks for each in figures):
        call_waiting(resource, begin, until)
    if not db.in_transaction():
        ledger.write()
        ledger.forget()


def call_waiting(resource: int, begin: float = 0, until: float = 2**62) -> None:
    """Lets those be tried again that wait for room there, or that lacked something else."""
    if standing().waits:
        run('UPDATE wait SET due = 0 WHERE resource_id = ? AND until > ? AND held_from < ?',
            resource, begin, until)
        run('UPDATE wait SET due = 0 WHERE limited')
        remembered.change()


def release(resource: int, begin: int, until: int, amount: Amount) -> None:
    hold(resource, begin, until, NOTHING - amount)


def fits(resource, begin: float, until: float, amount: Amount) -> bool:
    """Whether a resource row has room for an amount during all of a window."""
    return (peak(resource.id, begin, until, amount.names) + amount).within(capacity(resource))


def give(pieces: Iterable[Hold]) -> None:
    """Releases what is held in some pieces."""
    for each in pieces:
        release(*each)


def take(pieces: list[Hold], now: float, given: list[Hold] = ()) -> None:
    """Holds pieces, which don't overlap, if they fit from now on, else NoCapacity.

    Args:
      given: what the same change has given back before: that much is there
    """
    refuse_without_room(beyond(pieces, given), now)
    for each in pieces:
        hold(*each)


def refuse_without_room(pieces: Iterable[Hold], now: float) -> None:
    """NoCapacity if one of some pieces, which don't overlap, doesn't fit from now on."""
    for each in pieces:
        place = resource_of(each.resource, removed=True)
        if each.until > now and not fits(place, max(each.begin, int(now)), each.until, each.amount):
            raise NoCapacity('')


def steps(resource: int, begin: float, until: float,
          classes: Iterable[str] = ()) -> Iterator[tuple[float, Amount]]:
    """The step function in a window: (instant, level from then on), also of CLOSED."""
    tracks = ['', CLOSED, *classes]
    levels = {track: [written_level(resource, track, begin), ZERO] for track in tracks}
    marks = ', '.join('?' * len(tracks))
    changes = [(at, track, 0, figures) for at, track, *figures in run(
        f'SELECT at, track, vms, vcpus, ram FROM step WHERE resource_id = ? AND track IN ({marks}) '
        'AND at > ? AND at < ? ORDER BY at', resource, *tracks, begin, until)]
    changes += [(at, track, 1, more) for track in tracks
                for at, _, more in ledger.within(resource, track, begin, until)]
    at = begin
    for after, track, side, figures in [*sorted(changes), (until, '', 0, ZERO)]:
        if after > at:
            held = {track: plus(*each) for track, each in levels.items()}
            classes = ((name, held[name][0]) for name in tracks[1:] if held[name][0])
            yield at, Amount(*held[''], tuple(classes))
        at, levels[track][side] = after, figures


def peaks(resource: int, begin: int, width: int, number: int,
          classes: Iterable[str] = ()) -> list[Amount]:
    """The peaks of so many spans of so many seconds, one after the other."""
    tracks = {track: peaks_of(resource, track, begin, width, number) for track in ('', *classes)}
    return [Amount(*tracks[''][n], tuple((name, tracks[name][n][0]) for name in tracks if name
                                         and tracks[name][n][0])) for n in range(number)]


def peaks_of(resource: int, track: str, begin: int, width: int, number: int) -> list[tuple]:
    spans = {n: (first, peak, last) for n, first, *peak, last in run(
        'SELECT (at - ?) / ?, min(at), max(vms), max(vcpus), max(ram), max(at) FROM step WHERE '
        'resource_id = ? '
        'AND track = ? AND at >= ? AND at < ? GROUP BY 1', begin, width, resource, track, begin,
        begin + width * number)}
    at_last = dict((at, figures) for at, *figures in run(
        'SELECT at, vms, vcpus, ram FROM step WHERE resource_id = ? AND track = ? AND at IN '
        '(SELECT value FROM json_each(?))', resource, track,
        json.dumps([last for _, _, last in spans.values()])))
    carried, found = level_of(resource, track, begin), []
    for n in range(number):
        first, inside, last = spans.get(n, (None, carried, None))
        # What holds at the beginning counts, unless there is a step just there.
        found.append(tuple(inside if first in (None, begin + n * width)
                           else map(max, inside, carried)))
        carried = at_last.get(last, carried)
    return found


def free_windows(resource, amount: Amount, after: float,
                 before: float) -> Iterator[tuple[float, float]]:
    """The longest [begin, until) within [after, before) in which an amount fits, in order."""
    most = capacity(resource)
    found = overlaps(free_of(resource.id, '', amount[:3], most[:3], after, before),
                     free_of(resource.id, CLOSED, (0,), (0,), after, before))
    for name, need in amount.classes:
        found = overlaps(found,
                         free_of(resource.id, name, (need,), (most.most(name),), after, before))
    return found


def free_of(resource: int, track: str, need: tuple, most: tuple, after: float,
            before: float) -> Iterator[tuple[float, float]]:
    """The free windows of one step function."""
    rooms = [2**62 if limit is None else limit - each for limit, each in zip(most, need)]
    free = None  # it may go on
    for begin, until, more in ledger.within(resource, track, after, before):
        left = [room - each for room, each in zip(rooms, more)]
        for first, last in free_within(resource, track, left, begin, until):
            if free and free[1] < first:
                yield free
                free = None
            free = (free[0] if free else first, last)
            if last < until:
                yield free
                free = None
    if free:
        yield free


def free_within(resource: int, track: str, rooms: list, after: float,
                before: float) -> Iterator[tuple[float, float]]:
    """The windows in which no more than some figures is written as held."""
    held = written_level(resource, track, after)
    begin = after if all(each <= room for each, room in zip(held, rooms)) else None
    at = after
    while at < before:
        at = next_step(resource, track, rooms, at, before, free=begin is None)
        if begin is not None:
            yield begin, at
        begin = at if begin is None else None


def next_step(resource: int, track: str, rooms: list, after: float, before: float,
              free: bool) -> float:
    """The first step in (after, before) within some figures, or beyond them; else `before`."""
    within = ' AND '.join(f'{figure} <= ?' for figure, _ in zip(FIGURES, rooms))
    found = run('SELECT at FROM step WHERE resource_id = ? AND track = ? AND at > ? AND at < ? AND '
                f"{'' if free else 'NOT'} ({within}) ORDER BY at LIMIT 1",
                resource, track, after, before, *rooms).fetchone()
    return found[0] if found else before


def overlaps(ones: Iterator, others: Iterator) -> Iterator[tuple[float, float]]:
    """What windows of two kinds have in common, each in order and apart from one another."""
    one, other = next(ones, None), next(others, None)
    while one and other:
        begin, until = max(one[0], other[0]), min(one[1], other[1])
        if begin < until:
            yield begin, until
        if one[1] <= other[1]:
            one = next(ones, None)
        else:
            other = next(others, None)


def held_steps(resource: int) -> Iterator[tuple[tuple[str, int], tuple]]:
    """The step functions as what is held gives them: what table `step` must hold."""
    changes = defaultdict(lambda: NOTHING)
    held = rows('SELECT start AS held_from, "end" AS held_until, held_vms AS vms, held_vcpus AS '
                'vcpus, held_ram AS ram, held_classes AS classes FROM capacity WHERE resource_id = '
                '? AND removed IS NULL', resource)
    for table in ('occurrence', 'extra_hold'):
        held += rows(f'SELECT held_from, held_until, vms, vcpus, ram, classes FROM {table} '
                     'WHERE resource_id = ? AND held_from < held_until', resource)
    for each in held:
        changes[each.held_from] += amount_of(each)
        changes[each.held_until] -= amount_of(each)
    levels = defaultdict(lambda: (0, 0, 0))
    for at in sorted(changes):
        for track, figures in changes[at].tracks:
            levels[track] = tuple(a + b for a, b in zip(levels[track], figures))
            yield (track, at), levels[track]


# Clouds ######################################################################
#
# What a cloud must do for us: know names, boot one machine under a mark, list the servers that
# carry our marks, delete one. A mark is unique for each attempt to make a server and is set in the
# create call itself, so that a server whose answer was lost is found again.


class Flavor(NamedTuple):
    """What one machine takes: vcpus, ram in MiB, other resource classes as an Amount has them."""
    vcpus: int
    ram: int
    classes: tuple = ()


class Thing(NamedTuple):
    """Something on a cloud that goes by a name, and who may use it."""
    id: str
    name: str
    own: bool           # it is of the project of the account, or shared with it
    open: bool = False  # everybody on that cloud may use it
    mark: str = ''      # a server's tag of cmres, of whatever store
    flavor: Flavor | None = None


class Sight(NamedTuple):
    """Which names of an account somebody may use; for them, nothing else is there.

    Args:
      project: for whom; of the servers that cmres made, those of its reservations are in sight
      all_own: whether all that is the account's own is in sight, not only what is open to everybody
      named: KIND:NAME of what is in sight besides
    """
    project: str
    all_own: bool
    named: frozenset = frozenset()

    def shows(self, kind: str, thing: Thing) -> bool:
        """Whether something is in sight."""
        ours = bool(thing.mark) and made_for(thing.id, self.project)
        if thing.mark and not ours:
            return False
        named = {f'{kind}:{thing.name}', f'{kind}:{thing.id}'} & self.named
        return thing.open or thing.own and bool(self.all_own or ours or named)


EVERYTHING = Sight('', True)


def made_for(uid: str, project: str) -> bool:
    """Whether a server was made for a reservation of a project."""
    return bool(row('SELECT r.id FROM server v JOIN occurrence o ON o.id = v.occurrence_id '
                    'JOIN reservation r ON r.id = o.reservation_id '
                    'WHERE v.uid = ? AND NOT v.borrowed AND r.project = ?', uid, project))


def named_by(wish: dict) -> list[tuple[str, str]]:
    """What a cloud must know of a wish: kinds and names, without the networks `auto` and `none`."""
    named = [(kind, wish[kind]) for kind in KINDS if wish.get(kind)]
    named += [('security_group', name) for name in wish.get('security_groups') or ()]
    return [pair for pair in named if pair not in (('network', 'auto'), ('network', 'none'))]


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
    hint: str = ''  # the label under which Nova's scheduler is to let it boot
    sight: Sight = EVERYTHING  # what it may be made of
    #: Called just before the request that makes it; raises if it is too late for that.
    fence: Callable[[], None] = lambda: None


class Aggregate(NamedTuple):
    """A host aggregate as the operator of a cloud sees it."""
    name: str
    hosts: dict[str, Amount]  # what each holds, by Placement
    mark: str  # the resource that it is marked with, or ''


def classes_of(extra_specs: dict) -> tuple:
    """The resource classes that a flavor asks for, of all its groups (Nova's extra specs
    resources*:CLASS).
    """
    found: dict = defaultdict(int)
    for key, value in extra_specs.items():
        match = re.fullmatch('resources[A-Za-z0-9_-]*:([A-Z0-9_]+)', key)
        if match and match[1] not in PLAIN and re.fullmatch('[0-9]{1,9}', str(value)):
            found[match[1]] += int(value)
    return tuple(sorted((name, each) for name, each in found.items() if each))


class Seen(NamedTuple):
    """A server of ours as its cloud shows it: Nova's status in lower case, `made` in seconds since
    1970.
    """
    uid: str
    mark: str
    state: str
    made: float
    fault: str = ''
    addresses: list = []
    name: str = ''


#: What Nova may still list for a moment.
GONE = ('deleted', 'soft_deleted')


MEASURED_CALLS = set('things boot servers delete server start stop shelve snapshot saved '
                     'aggregates mark hosts'.split())
calling = threading.local()  # whether this thread is in such a call already


def measured(call: Callable) -> Callable:
    """A call to a cloud that is timed and logged; those inside it are part of it."""
    @functools.wraps(call)
    def asked(self, *args, **options):
        if getattr(calling, 'now', False):
            return call(self, *args, **options)
        calling.now, began = True, time.monotonic()
        labels = {'cloud': self.account, 'verb': call.__name__, 'result': 'ok'}
        try:
            return call(self, *args, **options)
        except Exception as error:
            labels['result'] = result_of(error)
            raise
        finally:
            calling.now, took = False, time.monotonic() - began
            METRICS.observe('cloud_call_seconds', took, **labels)
            told_fields(log_calls, 'call', **labels, ms=round(1000 * took, 1))
    return asked


def result_of(error: Exception) -> str:
    """How a call to a cloud ended, in one of few words."""
    if isinstance(error, CloudError):
        return f"{error.details.get('status') or 'unanswered'}"
    return 'refused' if isinstance(error, Error) else 'failed'


class Cloud:
    """One account on one cloud. Every verb may raise CloudError.

    All requests of a verb together have `call_timeout`: none is begun after that, and none waits
    longer for its headers. `aggregates` and `hosts` have that time for each host or server.
    """

    def __init__(self, account: str):
        self.account = account

    def __init_subclass__(cls, **options):
        """Has all calls of a kind of cloud measured and logged."""
        super().__init_subclass__(**options)
        for verb in MEASURED_CALLS & vars(cls).keys():
            setattr(cls, verb, measured(vars(cls)[verb]))

    def things(self, kind: str, name: str = '') -> list[Thing]:
        """What there is of one of KINDS; with a name, only what has it as its name or id."""
        raise NotImplementedError

    def find(self, kind: str, name: str, sight: Sight = EVERYTHING) -> Thing | None:
        """The one thing in sight of that name or id; None if there is none.

        Raises:
          Invalid: there are several.
        """
        found = [each for each in self.things(kind, name) if sight.shows(kind, each)]
        found = [each for each in found if each.id == name] or found
        if len(found) > 1:
            raise Invalid(f"the cloud {self.account} has {len(found)} of the name '{name}'; "
                          f"give the {kind.replace('_', ' ')} by its id")
        return found[0] if found else None

    def names(self, kind: str, sight: Sight = EVERYTHING) -> list[str]:
        """The names of what is in sight, of a kind."""
        return [each.name for each in self.things(kind) if each.name and sight.shows(kind, each)]

    def boot(self, machine: Machine) -> str:
        """Begins to make one server and tells its id; unless CloudError is `sure`, it may exist all
        the same.

        Calls the machine's `fence` just before the one request that makes it, and lets through what
        that raises.
        """
        raise NotImplementedError

    def servers(self) -> list[Seen]:
        """All servers that carry this store's marks, in whatever state."""
        raise NotImplementedError

    def delete(self, uid: str) -> None:
        """Begins to delete a server; it is gone when servers() doesn't show it; one that is gone
        already is fine.
        """
        raise NotImplementedError

    def server(self, uid: str) -> Seen | None:
        """One server by its id, with our mark or without; None if it is not there."""
        raise NotImplementedError

    def start(self, uid: str) -> None:
        """Begins to make a server active that is at rest, in rescue or resized; one that is active
        is fine.
        """
        raise NotImplementedError

    def stop(self, uid: str) -> None:
        """Begins to stop a server; it is SHUTOFF then. One that is so already is fine."""
        raise NotImplementedError

    def shelve(self, uid: str) -> None:
        """Begins to shelve a server; it frees its host then. One that is so already is fine."""
        raise NotImplementedError

    def snapshot(self, uid: str, name: str) -> str:
        """Begins to make an image of a server, unless there is one of that name, and tells the
        image's id.
        """
        raise NotImplementedError

    def saved(self, image: str) -> bool | None:
        """Whether an image is complete; None if it never will be."""
        raise NotImplementedError

    def aggregates(self) -> list[Aggregate]:
        """All host aggregates; for the operator of a cloud."""
        raise NotImplementedError

    def mark(self, aggregate: str, resource: str) -> None:
        """Marks an aggregate with a resource, so that Nova's scheduler asks for it; '' takes the
        mark away.
        """
        raise NotImplementedError

    def hosts(self, uids: Iterable[str]) -> dict[str, str | None]:
        """On which host each server is: '' while it is nowhere yet, None if it is gone or
        failed.
        """
        raise NotImplementedError

    def time(self) -> float | None:
        """The cloud's own clock, in seconds since 1970, to about a second; None where it tells
        none.
        """
        return None

    def check(self, named: Iterable[tuple[str, str]], sight: Sight = EVERYTHING) -> list[Thing]:
        """What is found for (kind, name) pairs, in their order.

        Raises:
          Invalid: no such thing is in sight; the sentence tells the nearest name that is.
        """
        found = []
        for kind, name in named:
            thing = self.find(kind, name, sight)
            if thing is None:
                raise Invalid(f"the cloud {self.account} has no {kind.replace('_', ' ')} '{name}'"
                              f"{nearest(name, self.names(kind, sight))}")
            found.append(thing)
        return found


UUID = re.compile('[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}')


class OpenStack(Cloud):
    """An entry of clouds.yaml, through openstacksdk."""

    # In the SDK: service, the verb that lists all, and the one that gets one by its id.
    VERBS = {'flavor': ('compute', 'flavors', ''), 'key': ('compute', 'keypairs', ''),
             'image': ('image', 'images', 'get_image'),
             'server': ('compute', 'servers', 'get_server'),
             'network': ('network', 'networks', 'get_network'),
             'security_group': ('network', 'security_groups', 'get_security_group')}
    REMEMBER = 300  # seconds that a found name is taken for granted
    DOOR_SHUT = 2   # seconds that nobody else waits at a cloud which has just refused to log us in

    def __init__(self, account: str, store: str, config: Config):
        super().__init__(account)
        self.store, self.config = store, config
        self.found: dict = {}  # by kind, name and sight: when it was found, and what
        self.lock = threading.Lock()
        self.verb = threading.local()  # since when this thread is at it
        self.session = None
        self.refused: tuple = (0, None)  # until when nobody else is let to the door, and why

    @contextmanager
    def calling(self, what: str, sure: bool = False):
        """The connection, for a verb that has `call_timeout` for all of its requests together."""
        before = getattr(self.verb, 'began', None)
        self.verb.began = before or time.monotonic()
        try:
            with self.telling(what, sure):
                yield self.connection
        finally:
            self.verb.began = before

    def time_left(self) -> float:
        """The seconds that this thread's verb may still take.

        Raises:
          CloudError: none; it is sure, as no request is begun then.
        """
        most = self.config.call_timeout
        left = (getattr(self.verb, 'began', None) or time.monotonic()) + most - time.monotonic()
        if left <= 0:
            raise CloudError(f'the cloud {self.account} did not answer within {most:g} seconds, '
                             'so it was asked nothing more', sure=True)
        return left

    @property
    def connection(self):
        """One authenticated connection for all threads; after a failure, a new one in a while."""
        with self.lock, self.telling('be reached', sure=True):
            if time.monotonic() < self.refused[0]:
                raise self.refused[1]
            try:
                self.session = self.session or self.log_in()
            except Exception as error:  # of any kind: it is raised on, and `telling` words it
                self.refused = time.monotonic() + self.DOOR_SHUT, error
                raise
            return self.session

    def log_in(self):
        import openstack
        if self.account not in openstack.config.OpenStackConfig().get_cloud_names():
            raise UnknownCloud(f'the cloud {self.account} is not in clouds.yaml', sure=True)
        connection = openstack.connect(cloud=self.account, api_timeout=self.config.call_timeout,
                                       app_name='cmres')
        door = self.door()
        for scheme in ('http://', 'https://'):
            connection.session.session.mount(scheme, door)
        connection.compute.get_endpoint_data()  # negotiates versions before threads do
        return connection

    def door(self):
        """What all requests go through: a connection for each thread, and a look at the time."""
        from keystoneauth1.session import TCPKeepAliveAdapter
        time_left = self.time_left

        class Door(TCPKeepAliveAdapter):
            def send(self, request, *args, **options):
                return super().send(request, *args, **options | {'timeout': time_left()})
        return Door(pool_maxsize=self.config.workers + self.config.threads)

    @contextmanager
    def telling(self, what: str, sure: bool = False):
        """Makes CloudError of whatever goes wrong between here and the cloud."""
        try:
            yield
        except Error:
            raise
        # the SDK's, keystoneauth's, requests', urllib3's and the parser's own kinds
        except Exception as error:
            status = getattr(error, 'status_code', None) or getattr(error, 'http_status', None) or 0
            if status == 401:  # the operator may put a new credential into clouds.yaml
                self.session = None
            response = getattr(error, 'response', None)
            details = ({'retry_after': response.headers.get('Retry-After')} if response is not None
                       else {})
            text = getattr(error, 'details', None) or str(error) or type(error).__name__
            raise CloudError(f"the cloud {self.account} could not {what}: "
                             f"{textwrap.shorten(str(text), 300)}",
                             sure or 400 <= status < 500 and status != 408, status=status,
                             **details) from error

    def find(self, kind, name, sight=EVERYTHING):
        key, oldest = (kind, name, sight), time.monotonic() - self.REMEMBER
        found, thing = self.found.get(key, (oldest, None))
        if found > oldest:
            self.verb.remembered = True
            return thing
        thing = super().find(kind, name, sight)
        if thing and kind != 'server':  # what is not in sight is looked up anew each time
            self.found = {each: kept for each, kept in self.found.items() if kept[0] > oldest}
            self.found[key] = time.monotonic(), thing
        return thing

    def forget(self, named: list[tuple[str, str]]) -> None:
        """Lets names be looked up anew: one of them stands for something else by now."""
        for key in [*self.found]:
            if key[:2] in named:
                self.found.pop(key, None)

    def things(self, kind, name=''):
        service, listing, getter = self.VERBS[kind]
        with self.calling(f"find the {kind.replace('_', ' ')}", sure=True) as cloud:
            if getter and UUID.fullmatch(name):
                found = self.by_id(getattr(getattr(cloud, service), getter), name)
            else:
                listed = getattr(getattr(cloud, service), listing)(**self.only(cloud, kind, name))
                found = [each for each in listed if name in ('', each.name, each.id)]
            if kind == 'flavor' and name:  # where Nova does not list them with the flavors
                found = [each if each.extra_specs else each.fetch_extra_specs(cloud.compute)
                         for each in found]
            return [getattr(self, f'{kind}_thing')(cloud, each) for each in found]

    def by_id(self, verb: Callable, id: str) -> list:
        """The one thing of an id, or none: what is another's, a cloud may also forbid to see."""
        from openstack.exceptions import ForbiddenException
        try:
            return [each for each in [self.got(verb, id)] if each]
        except ForbiddenException:
            return []

    def got(self, verb: Callable, id: str):
        """One thing by its id; None if it is not there."""
        from openstack.exceptions import NotFoundException
        try:
            return verb(id)
        except NotFoundException:
            return None

    def only(self, cloud, kind: str, name: str) -> dict:
        """How the list of a kind is asked for.

        Whoever asks, Nova lists public flavors and those that the project was given; it takes the
        name of a server for a regular expression. To an admin, Neutron lists all projects' groups.
        """
        if kind == 'flavor':
            return {'is_public': True}
        if kind == 'key' or not name and kind != 'security_group':
            return {}
        named = {'name': f'^{re.escape(name)}$' if kind == 'server' else name} if name else {}
        own = {'project_id': cloud.current_project_id} if kind == 'security_group' else {}
        return named | own

    # Whose each thing is: the account of an admin is shown what belongs to others as well.

    def flavor_thing(self, cloud, found) -> Thing:
        takes = Flavor(found.vcpus, found.ram, classes_of(found.extra_specs or {}))
        return Thing(found.id, found.name, own=True, open=True, flavor=takes)

    def key_thing(self, cloud, found) -> Thing:
        return Thing(found.id, found.name, own=True)

    def image_thing(self, cloud, found) -> Thing:
        project = cloud.current_project_id
        own = found.owner_id == project
        if not own and found.visibility == 'shared':
            own = any((each.member_id, each.status) == (project, 'accepted')
                      for each in cloud.image.members(found.id))
        return Thing(found.id, found.name, own, open=found.visibility in ('public', 'community'))

    def network_thing(self, cloud, found) -> Thing:
        own = found.project_id == cloud.current_project_id
        shared = bool(found.is_shared or found.is_router_external)
        return Thing(found.id, found.name, own, open=shared)

    def security_group_thing(self, cloud, found) -> Thing:
        own = found.project_id == cloud.current_project_id
        return Thing(found.id, found.name, own, open=own and found.name == 'default')

    def server_thing(self, cloud, found) -> Thing:
        # Until it has a host, Nova may show a server without its tags: it may be anybody's.
        own = found.project_id == cloud.current_project_id and found.status != 'BUILD'
        mark = next((tag for tag in found.tags or () if tag.startswith('cmres-')), '')
        return Thing(found.id, found.name, own, mark=mark)

    def boot(self, machine):
        with self.calling('make a server'):
            self.verb.remembered = False
            try:
                return self.create(machine)
            except CloudError as error:
                if error.details.get('status') not in (400, 404):
                    raise
                self.forget(named_by(machine._asdict()))
                if not self.verb.remembered:  # they were new
                    raise
                return self.create(machine)

    def create(self, machine: Machine) -> str:
        """Makes a server of what the names stand for."""
        import base64
        named, found = named_by(machine._asdict()), defaultdict(list)
        for (kind, _), thing in zip(named, self.check(named, machine.sight)):
            found[kind].append(thing.id)
        wish = {'name': machine.name, 'metadata': machine.metadata,
                'flavor_id': found['flavor'][0], 'image_id': found['image'][0],
                'tags': [self.store, machine.mark],
                'networks': [{'uuid': id} for id in found['network']] or machine.network or 'auto'}
        if machine.key:
            wish['key_name'] = machine.key
        if machine.security_groups:
            wish['security_groups'] = [{'name': id} for id in found['security_group']]
        if machine.hint:
            wish['scheduler_hints'] = {'cmres': machine.hint}
        if machine.user_data:
            wish['user_data'] = base64.b64encode(machine.user_data.encode()).decode()
        machine.fence()
        with self.calling('make a server') as cloud:
            return cloud.compute.create_server(**wish).id

    def servers(self):
        with self.calling('list servers', sure=True) as cloud:
            return [self.seen(server) for server in cloud.compute.servers(tags=self.store)]

    def seen(self, server) -> Seen:
        mark = next((tag for tag in server.tags or () if tag.startswith(f'{self.store}-')), '')
        fault = server.fault.get('message', '') if isinstance(server.fault, dict) else ''
        addresses = [each['addr'] for each in sum((server.addresses or {}).values(), [])]
        made = datetime.fromisoformat(server.created_at).timestamp()
        state = (server.status or 'unknown').lower()
        return Seen(server.id, mark, state, made, fault, addresses, server.name)

    def delete(self, uid):
        with self.calling('delete a server', sure=True) as cloud:
            cloud.compute.delete_server(uid, ignore_missing=True)

    def server(self, uid):
        with self.calling('show a server', sure=True) as cloud:
            found = self.got(cloud.compute.get_server, uid)
            return self.seen(found) if found else None

    def start(self, uid):
        with self.calling('start a server', sure=True) as cloud:
            compute = cloud.compute
            how = {'PAUSED': compute.unpause_server, 'SUSPENDED': compute.resume_server,
                   'RESCUE': compute.unrescue_server,
                   'VERIFY_RESIZE': compute.confirm_server_resize,
                   'SHELVED': compute.unshelve_server, 'SHELVED_OFFLOADED': compute.unshelve_server}
            verb = how.get(compute.get_server(uid).status, compute.start_server)
            tasks = 'powering-on|unpausing|resuming|unrescuing|unshelving|spawning'
            self.once(compute, verb, uid, 'ACTIVE', tasks)

    def stop(self, uid):
        with self.calling('stop a server', sure=True) as cloud:
            self.once(cloud.compute, cloud.compute.stop_server, uid, 'SHUTOFF', 'powering-off')

    def shelve(self, uid):
        with self.calling('shelve a server', sure=True) as cloud:
            self.once(cloud.compute, cloud.compute.shelve_server, uid, 'SHELVED.*', 'shelving.*')

    def once(self, compute, verb: Callable, uid: str, status: str, task: str) -> None:
        """Begins what an earlier call may have begun, whose answer was lost: then Nova refuses it.

        Args:
          status, task: Nova's status of a server when that is done, its task while it is under way
        """
        from openstack.exceptions import ConflictException
        try:
            verb(uid)
        except ConflictException:
            found = compute.get_server(uid)
            done = re.fullmatch(status, found.status)
            if not done and not re.fullmatch(task, found.task_state or ''):
                raise

    def snapshot(self, uid, name):
        with self.calling('make an image of a server', sure=True) as cloud:
            # Of a call whose answer was lost; somebody else's of that name is none.
            made = [each for each in cloud.image.images(name=name)
                    if each.owner_id == cloud.current_project_id]
            return (made[0] if made else cloud.compute.create_server_image(uid, name)).id

    def saved(self, image):
        with self.calling('show an image', sure=True) as cloud:
            found = self.got(cloud.image.get_image, image)
            gone = (found is None
                    or found.status in ('killed', 'deleted', 'pending_delete', 'deactivated'))
            return None if gone else found.status == 'active'

    def aggregates(self):
        with self.calling('list aggregates', sure=True) as cloud:
            found = [*cloud.compute.aggregates()]
        return [Aggregate(each.name,
                          {host: self.host_holds(host) for host in sorted(each.hosts or [])},
                          (each.metadata or {}).get('cmres', '')) for each in found]

    def host_holds(self, host: str) -> Amount:
        """What Placement gives out of a host and of what is in it (total, reserved, ratio)."""
        found: dict = defaultdict(int)
        with self.calling('tell what a host holds', sure=True) as cloud:
            placement = cloud.placement
            for root in placement.resource_providers(name=host):
                for provider in placement.resource_providers(in_tree=root.id):
                    for each in placement.resource_provider_inventories(provider):
                        name = each.resource_class or each.id
                        found[name] += int((each.total - each.reserved) * each.allocation_ratio)
        return Amount(0, found['VCPU'], found['MEMORY_MB'], tuple(sorted(
            (name, each) for name, each in found.items() if name not in PLAIN and each)))

    def mark(self, aggregate, resource):
        with self.calling('mark an aggregate', sure=True) as cloud:
            found = next(each for each in cloud.compute.aggregates() if each.name == aggregate)
            cloud.compute.set_aggregate_metadata(found, {'cmres': resource or None})

    def hosts(self, uids):
        return {uid: self.host_of(uid) for uid in uids}

    def host_of(self, uid: str) -> str | None:
        """The host of a server: '' while it is nowhere yet, None if it is gone or failed."""
        with self.calling('tell where a server is', sure=True) as cloud:
            server = self.got(cloud.compute.get_server, uid)
            if not server:
                return None
            host = server.compute_host or server.hypervisor_hostname or ''
            failed = server.status.lower() in GONE or server.status == 'ERROR' and not host
            return None if failed else host

    def time(self):  # the header Date of any answer, RFC 9110, section 6.6.1
        from email.utils import parsedate_to_datetime
        with self.calling('tell the time', sure=True) as cloud:
            said = cloud.compute.get('/flavors', params={'limit': 1}).headers.get('Date')
            return parsedate_to_datetime(said).timestamp() if said else None


class Simulated(Cloud):
    """A cloud inside the store, to see and test everything without one."""

    FLAVORS = {'m1.tiny': Flavor(1, 512), 'm1.small': Flavor(1, 2048), 'm1.medium': Flavor(2, 4096),
               'm1.large': Flavor(4, 8192), 'm1.xlarge': Flavor(8, 16384),
               'g1.medium': Flavor(2, 4096, (('CUSTOM_GPU', 1),))}
    NAMES = {'flavor': FLAVORS, 'image': ('cirros', 'debian-12', 'ubuntu-24.04'),
             'network': ('private', 'public'),
             'key': ('default',), 'security_group': ('default',)}

    def __init__(self, account: str, store: str, config: Config, clock: Callable[[], float]):
        super().__init__(account)
        self.store, self.config, self.clock = store, config, clock

    def things(self, kind, name=''):
        if kind == 'server':
            return [Thing(each.uid, each.name, own=True, mark=each.mark) for each in self.present()
                    if name in ('', each.uid, each.name)]
        return [Thing(each, each, own=True, open=kind != 'key', flavor=self.FLAVORS.get(each))
                for each in self.NAMES[kind] if name in ('', each)]

    def boot(self, machine):
        time.sleep(self.config.simulated_latency)
        self.check(named_by(machine._asdict()), machine.sight)
        uid = secrets.token_hex(8)
        machine.fence()
        with transaction():
            full = 0 < self.config.simulated_vms <= self.present().count()
            fault = ('No valid host was found.' if full
                     or random.random() < self.config.simulated_failures else '')
            insert(SimulatedServer, account=self.account, uid=uid, name=machine.name,
                   mark=machine.mark,
                   made=self.clock(), boots=self.config.simulated_boot, power='active', fault=fault)
        return uid

    #: Two hosts, as `resource sync` finds them.
    AGGREGATES = (Aggregate('gpu', dict.fromkeys(('gpu-1', 'gpu-2'),
                                                 Amount(0, 16, 65536, (('CUSTOM_GPU', 4),))), ''),)

    def aggregates(self):
        marks = dict(run('SELECT substr(name, 6), value FROM fact '
                         "WHERE name LIKE 'mark-%'").fetchall())
        return [each._replace(mark=marks.get(each.name, '')) for each in self.AGGREGATES]

    def mark(self, aggregate, resource):
        with transaction():
            note_fact(f'mark-{aggregate}', resource)

    def hosts(self, uids):
        there = {each.uid for each in self.present()}
        return {uid: 'gpu-1' if uid in there else None for uid in uids}

    def present(self):
        return SimulatedServer.select().where(SimulatedServer.account == self.account,
                                              SimulatedServer.gone.is_null())

    def servers(self):
        time.sleep(self.config.simulated_latency)
        ours = SimulatedServer.mark.startswith(self.store)
        return [self.seen(server)
                for server in self.present().where(ours).order_by(SimulatedServer.id)]

    def server(self, uid):
        found = self.present().where(SimulatedServer.uid == uid).first()
        return self.seen(found) if found else None

    def seen(self, server) -> Seen:
        up = self.clock() >= server.made + server.boots
        state = 'build' if not up else 'error' if server.fault else server.power
        address = f'10.0.{server.id // 250 % 250}.{server.id % 250 + 1}'
        return Seen(server.uid, server.mark, state, server.made, server.fault if up else '',
                    [address] if up else [], server.name)

    def delete(self, uid):
        self.set(uid, gone=self.clock())

    #: What Nova can shelve or make an image of (its API: shelve, createImage).
    AT_HAND = ('active', 'shutoff', 'paused', 'suspended')

    def set(self, uid: str, states: tuple = (), **values) -> None:
        """Changes a server that is in one of some states; without any, in whatever state."""
        time.sleep(self.config.simulated_latency)
        with transaction():
            found = self.present().where(SimulatedServer.uid == uid).first()
            if found and (not states or found.power in states):
                SimulatedServer.update(**values).where(SimulatedServer.id == found.id).execute()
            elif found:
                raise CloudError(f'the cloud {self.account} can not do that while the server is '
                                 f'{found.power}', sure=True, status=409)
        if not found and 'gone' not in values:
            raise CloudError(f'the cloud {self.account} has no server {uid}', sure=True, status=404)

    def start(self, uid):
        self.set(uid, power='active')

    def stop(self, uid):
        self.set(uid, ('active',), power='shutoff')

    def shelve(self, uid):
        self.set(uid, self.AT_HAND, power='shelved_offloaded')

    def snapshot(self, uid, name):
        self.set(uid, self.AT_HAND, saved=self.clock() + self.config.simulated_boot)
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
        return self.config.read_again().credentials.get(f'{project}@{cloud}', cloud)

    def sight(self, account: str, project: str, trusted: Iterable[str] = (),
              admin: bool = False) -> Sight:
        """What may be named of an account for a project.

        Args:
          trusted: KIND:NAME of what the reservation was given by an admin
          admin: an admin asks, who may name all of it; else that takes an account of one's own
        """
        all_own = admin or self.owners(account) == {project}
        return Sight(project, all_own, self.config.common | {*trusted})

    def owners(self, account: str) -> set[str]:
        """The projects for which it was written down as their own account."""
        return {key.rpartition('@')[0] for key, entry in self.config.credentials.items()
                if entry == account}

    @functools.cached_property
    def store(self) -> str:
        """What all our marks begin with: two installations on one cloud don't touch each other's
        servers.
        """
        return f"cmres-{fact('store')}"

    def accounts(self) -> set[str]:
        """All accounts that serve the resources there are."""
        clouds = {each.cloud
                  for each in rows("SELECT DISTINCT cloud FROM resource WHERE cloud <> ''")}
        known = self.config.read_again().credentials
        return clouds | {entry for key, entry in known.items() if key.rpartition('@')[2] in clouds}

    def open(self, account: str) -> Cloud:
        with self.lock:
            if account not in self.opened:
                self.opened[account] = self.make(account)
            return self.opened[account]

    def make(self, account: str) -> Cloud:
        if account == 'simulated' or account.startswith('simulated-'):
            return Simulated(account, self.store, self.config, self.clock)
        return OpenStack(account, self.store, self.config)


# Notices #####################################################################
#
# What goes to addresses that people gave, and comes from there.
#
# A notice is written down with the event that it tells of, in the same transaction; the life cycle
# delivers it, at least once, with growing pauses for some days. Webhooks get signed JSON, people
# get mail in the words of the configuration.

GIVE_UP = 3 * 86400  # seconds after which an undeliverable notice is given up
RARELY = 3600  # seconds that pauses grow to before a host is asked again that does not answer
MOST_WAIT = 10  # seconds for an answer from an address that a person gave
MAIL_WAIT = 30  # seconds for all that a mail server says: some let one wait
PER_HOST = 2  # notices that are on their way to one host at the same time
MOST_FETCHED = 2**24  # bytes of it: a calendar

NOTICES = '''SELECT n.id, n.target, n.owner, n.tries, e.id AS event, e.at, e.actor, e.code,
                    e.sentence, e.reservation_id, e.occurrence
               FROM outbox n JOIN event e ON e.id = n.event_id'''


@functools.lru_cache(4096)
def host_of(target: str) -> str:
    """The host that a notice goes to; '' for mails, which all go to our own server."""
    try:
        return urlsplit(target).hostname or target if is_web(target) else ''
    except ValueError:  # such as http://[x; whoever delivers it finds that out as well
        return target


class Undelivered(Error):
    """A notice did not arrive; it may the next time."""


def deliver(config: Config, notice, about: dict) -> None:
    """Delivers one notice to its target; `about` is its reservation as an answer shows it.

    Raises:
      Undelivered: it was not accepted.
    """
    from http.client import HTTPException
    try:
        if is_web(notice.target):
            body = {'id': notice.event, 'event': notice.code, 'at': instant(notice.at),
                    'actor': notice.actor,
                    'sentence': notice.sentence, 'reservation': about}
            post(config, notice.target, json_text(body).encode())
        else:
            send_mail(config, notice, about)
    except (OSError, ValueError, HTTPException) as error:  # smtplib's are OSErrors
        raise Undelivered(f'{type(error).__name__}: {error}') from None


def post(config: Config, url: str, body: bytes) -> None:
    """Posts a webhook: signed if there is a secret, no redirects, and only where that is allowed.

    The header X-Cmres-Signature is `sha256=` and the hex HMAC of X-Cmres-Timestamp, a full stop and
    the body.
    """
    import hmac
    stamp = str(int(time.time())).encode()
    signature = hmac.new(config.webhook_secret.encode(), stamp + b'.' + body, 'sha256').hexdigest()
    status, _, _ = exchange(config, 'POST', url, body, {
        'Content-Type': 'application/json', 'X-Cmres-Timestamp': stamp.decode()}
        | ({'X-Cmres-Signature': f'sha256={signature}'} if config.webhook_secret else {}))
    if not 200 <= status < 300:
        raise ValueError(f'the webhook answered {status}; 200 to 299 is taken, and no redirect is '
                         f'followed')


def fetch(config: Config, url: str, headers: dict) -> tuple[int, dict, bytes]:
    """The answer to a GET of somebody's address, each of at most five redirects checked like the
    first.

    Raises:
      Undelivered: there is none, or not where that is allowed; the sentence doesn't tell the
        address.
    """
    from http.client import HTTPException
    try:
        for _ in range(6):
            status, found, body = exchange(config, 'GET', url, None, headers)
            if status not in (301, 302, 303, 307, 308):
                return status, found, body
            target = urljoin(url, found.get('location', ''))
            if (not re.fullmatch(WEB, target) or url.startswith('https:')
                and not target.startswith('https:')):
                raise ValueError('it redirects to an address that is not http(s), or no longer '
                                 'https')
            url = target
        raise ValueError('it redirects more than five times')
    except (OSError, ValueError, HTTPException) as error:
        kind = '' if type(error) is ValueError else f'{type(error).__name__}: '  # it's our sentence
        raise Undelivered(f'{kind}{first_line(error)}') from None


def exchange(config: Config, verb: str, url: str, body: bytes | None,
             headers: dict) -> tuple[int, dict, bytes]:
    """One request to an address that a person gave: its status, headers in lower case and body.

    Raises:
      OSError, ValueError, HTTPException: no answer within 10 seconds, more than MOST_FETCHED
        bytes, or a private address.
    """
    from http.client import HTTPConnection, HTTPSConnection
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == 'https' else 80)
    address = allowed_address(config, parts.hostname or '', port)
    kind = HTTPSConnection if parts.scheme == 'https' else HTTPConnection
    connection = kind(parts.hostname, port, timeout=MOST_WAIT)
    with cut_off(MOST_WAIT) as connect:
        try:
            # To the address that was checked: the name may mean another one a moment later.
            connection._create_connection = lambda _, *rest: connect((address, port), *rest)
            path = parts._replace(scheme='', netloc='', fragment='').geturl()
            connection.request(verb, path or '/', body,
                               {'User-Agent': f'cmres/{__version__}', **headers})
            answer = connection.getresponse()
            text = answer.read(MOST_FETCHED + 1)
            if len(text) > MOST_FETCHED:
                raise ValueError(f'it is larger than {MOST_FETCHED} bytes')
            if answer.length:
                raise ValueError(f'it is cut short by {answer.length} bytes')
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text
        finally:
            connection.close()


@contextmanager
def cut_off(seconds: float) -> Iterator[Callable]:
    """A `create_connection` whose connections end after so many seconds, however slow they are.

    A socket's own time-out is for each piece; this one is for all, a handshake of TLS included.
    """
    lines, over = [], threading.Event()

    def connect(*asked) -> socket.socket:
        made = socket.create_connection(*asked)
        lines.append(made.dup())  # what becomes of `made` is not known here: TLS takes it apart
        if over.is_set():
            hang_up(made)
        return made

    def end() -> None:
        over.set()
        for line in [*lines]:
            hang_up(line)
    watch = threading.Timer(seconds, end)
    watch.start()
    try:
        yield connect
    finally:
        watch.cancel()
        for line in lines:
            line.close()
    if over.is_set():  # what was read may look complete: HTTP headers end where a connection does
        raise TimeoutError(f'there was no complete answer within {seconds} seconds')


def hang_up(line: socket.socket) -> None:
    try:
        line.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is closed already
        pass


def allowed_address(config: Config, host: str, port: int) -> str:
    """The address of a host.

    Raises:
      ValueError: none is known, or one of them is not public and that is not allowed; in one
        sentence, so that nobody learns which hosts there are inside.
    """
    import ipaddress
    try:
        found = [ipaddress.ip_address(each[4][0].partition('%')[0])
                 for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):  # the name is not known, or none
        found = []
    if not found or not config.private_addresses and not all(map(is_public, found)):
        raise ValueError(f'{shown(host)} is not the name of a host on the public internet; check '
                         'the address (an operator can allow others: private_addresses)')
    return str(found[0])


#: Ranges that only later Pythons know not to be public, without so many bits: 192.0.0.0/24 is for
#: protocols, 3fff::/20 for examples (RFC 6890, RFC 9637).
NOT_PUBLIC = {4: (8, 0xc00000), 6: (108, 0x3fff0)}


def is_public(address) -> bool:
    """Whether an address is on the public internet, and so is each IPv4 address in it."""
    inside = embedded(address)
    bits, reserved = NOT_PUBLIC[address.version]
    if int(address) >> bits == reserved:
        return False
    if address.version == 6 and not (inside and is_translated(address)):
        # All that was ever given out is in 2000::/3 (IANA's registry of IPv6 address space).
        if int(address) >> 125 != 1 or not address.is_global:
            return False
    elif address.version == 4 and (not address.is_global or address.is_multicast):
        return False
    return all(map(is_public, inside))


def is_translated(address) -> bool:
    """Whether an IPv6 address only stands for an IPv4 one: mapped, or by NAT64 (RFC 6052)."""
    return int(address) >> 32 in (0xffff, 0x64ff9b << 64)


def embedded(address) -> list:
    """The IPv4 addresses that an IPv6 address leads to.

    Compatible and mapped (RFC 4291), NAT64 (RFC 6052), 6to4 (RFC 3056), Teredo (RFC 4380),
    ISATAP (RFC 5214).
    """
    import ipaddress
    if address.version == 4:
        return []
    number = int(address)
    found = [address.sixtofour, *(address.teredo or ())]
    if number >> 32 in (0, 0xffff, 0x64ff9b << 64) or number >> 32 & 0xfdffffff == 0x5efe:
        found.append(ipaddress.IPv4Address(number & 0xffffffff))
    return [each for each in found if each]


def send_mail(config: Config, notice, about: dict) -> None:
    if not config.mail_server:
        raise ValueError('no mail_server is set')
    import smtplib
    from email.message import EmailMessage
    from email.utils import formatdate
    host, _, port = config.mail_server.partition(':')
    message = EmailMessage()
    subject, _, text = notice_text(config, notice, about).partition('\n')
    message['From'], message['To'] = config.mail_from, notice.target
    message['Subject'] = f'[cmres] {subject}'
    message['Date'] = formatdate()  # RFC 5322 wants one, and spam filters miss it
    # a repeated one is known as such
    message['Message-ID'] = f'<event-{notice.event}-{notice.id}@cmres>'
    sentence = legible(notice.sentence)
    message.set_content(f'{text}\n\n{sentence}\n' if sentence not in text else f'{text}\n')
    with cut_off(MAIL_WAIT) as connect, smtplib.SMTP(timeout=MOST_WAIT) as server:
        server._get_socket = lambda host, port, timeout: connect((host, port), timeout)
        server.connect(host, int(port or 25))
        server.send_message(message)


def notice_text(config: Config, notice, about: dict) -> str:
    """The words of the configuration for an event, filled with its reservation."""
    zone = read_zone(about.get('tz') or config.timezone)
    fields = {name: in_cell(value, zone) for name, value in about.items()}
    fields |= {name: format_moment(value, zone) for name, value in about.items()
               if isinstance(value, datetime)}
    sentence = legible(notice.sentence)
    fields |= {'sentence': sentence, 'message': sentence, 'actor': legible(notice.actor)}
    return config.texts[notice.code].format_map(defaultdict(str, fields))


def in_cell(value, zone: ZoneInfo) -> str:
    """A value for people."""
    if isinstance(value, datetime):
        return format_time(value, zone)
    if isinstance(value, dict):
        return ' '.join(f'{name}={in_cell(each, zone)}' for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ', '.join(in_cell(each, zone) for each in value)
    if isinstance(value, str) and value.startswith('FREQ='):
        return rule_in_words(value)
    return '-' if value is None else legible(str(value))


def json_text(value, indent: int | None = None) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=to_plain)  # without a copy
    return legible(text) + '\n'


# Shares ######################################################################
#
# The server answers with few threads. A request that waits for a cloud or a host, or computes for
# long, keeps one of them to itself. So at most half of the threads may be kept like that, fewer by
# one user, and few for one cloud or host. Who comes then is refused at once and told what to do: a
# queue would keep the other half. So all that asks for nothing outside is always answered.

QUICK = 0.25  # seconds that a call may take before its request counts as one that waits
WAITS = ('wait', ''),  # what a request is counted as that waits for its turn to compute
#: What is said to who comes when no more may be.
FULL = {
    'all': (Unavailable, 'the server is busy with {most} slow requests, as many as it lets in; try '
                         'again in a minute'),
    'user': (TooMany, '{most} slow requests of {name} are under way; wait until one of them is '
                      'answered, then send this one again'),
    'target': (CloudError, '{most} requests wait for {name} already, which does not answer; try '
                           'again in a minute')}


class Outside(threading.Thread):
    """A call to a cloud or a host, in a thread of its own: it may hang when nobody waits."""

    def __init__(self, call: Callable, ends: Callable):
        super().__init__(daemon=True)
        self.call, self.ends = call, ends
        self.ended = threading.Event()
        self.answer: Any = None
        self.error: Exception | None = None
        self.counts: tuple = ()  # what it is counted under, once it is slow

    def run(self):
        try:
            self.answer = self.call()
        except Exception as error:  # of any kind: it is raised on where it is waited for
            self.error = error
        finally:
            if not db.is_closed():  # a connection of this thread's own
                db.close()
            self.ends(self)


class Rates:
    """How much each user and each address has had lately, and whether that is too much.

    A setting allows so much within a minute: all of it at once, and then again bit by bit.
    """
    KEPT = 10_000  # users and addresses that are remembered; who has had least is forgotten

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic):
        self.config, self.clock, self.lock = config, clock, threading.Lock()
        self.had: dict[tuple[str, str], tuple[float, float]] = {}  # how much, as of when

    def take(self, setting: str, who: str, number: float = 1) -> None:
        """Counts something before it is done; TooMany if it is more than the setting allows."""
        self.look(setting, who, number)
        self.add(setting, who, number)

    def look(self, setting: str, who: str, number: float = 0) -> None:
        """TooMany if somebody has had as much as the setting allows."""
        most = getattr(self.config, setting)
        too_much = self.level(setting, who) + number - most
        if most and too_much > 0:
            METRICS.count('limited_total', setting=setting)
            wait = math.ceil(too_much * 60 / most)
            raise TooMany(LIMITED[setting].format(most=f'{most:g}', wait=format_duration(wait)),
                          retry_after=wait)

    def level(self, setting: str, who: str) -> float:
        """How much somebody has had that is not given back yet."""
        had, at = self.had.get((setting, who), (0.0, 0.0))
        return max(had - getattr(self.config, setting) * (self.clock() - at) / 60, 0.0)

    def add(self, setting: str, who: str, number: float) -> None:
        """Counts something that was done, however much it is."""
        if not getattr(self.config, setting):
            return
        with self.lock:
            if len(self.had) >= self.KEPT and (setting, who) not in self.had:
                self.forget()
            self.had[setting, who] = self.level(setting, who) + number, self.clock()

    def forget(self) -> None:
        """Forgets the half that has had least."""
        kept = sorted(self.had, key=lambda key: self.level(*key))[len(self.had) // 2:]
        self.had = {key: self.had[key] for key in kept}


#: What is said to who has had as much as a setting allows within a minute.
LIMITED = {
    'requests_per_address': 'more than {most} requests within a minute came from your address. Try '
                            'again in {wait}',
    'requests_per_user': 'you have sent more than {most} requests within a minute. Try again in '
                         '{wait}',
    'mib_per_address': 'more than {most} MiB within a minute went to and from your address. Try '
                       'again in {wait}',
    'mib_per_user': 'more than {most} MiB within a minute went to and from you. Try again in '
                    '{wait}',
    'cpu_per_user': 'your dry runs and questions have taken more than {most} seconds of computing '
                    'within a minute. Try again in {wait}',
    'wrong_tokens': 'too many wrong tokens came from your address. Try again in {wait}'}


class Uses:
    """When tokens were used last, kept here until `write` is called: no request waits for that."""

    def __init__(self):
        self.lock, self.seen = threading.Lock(), {}

    def note(self, id: int, now: float) -> None:
        with self.lock:
            self.seen[id] = max(now, self.seen.get(id, 0))

    def latest(self, id: int) -> int:
        """When a token was used, as far as that is not written yet; 0 if it was not."""
        return int(self.seen.get(id, 0))

    def write(self) -> None:
        """Writes down what was noted since the last time."""
        with self.lock:
            seen, self.seen = self.seen, {}
        if seen:
            with transaction():
                for id, at in seen.items():
                    run('UPDATE token SET last_used = max(coalesce(last_used, 0), ?) '
                        'WHERE id = ?', int(at), id)


class Shares:
    """Which requests of this process take long at the same time, and how many more may."""

    def __init__(self, config: Config):
        self.patience = config.outside_timeout
        self.most = {'all': max(config.threads // 2, 1), 'wait': max(config.threads // 8, 1),
                     'user': config.slow_per_user,
                     'target': config.slow_per_target}
        self.rates, self.uses = Rates(config), Uses()
        self.wrong: Counter = Counter()  # tokens, by address
        self.changed = threading.Condition()
        self.pace = Turns()  # one of those that compute for long does so at a time
        self.taken: Counter = Counter()  # by kind and name
        # Of this thread's request: whose it is, how long it may still wait, what it has taken.
        self.request = threading.local()

    @contextmanager
    def answering(self, user: str) -> Iterator[None]:
        """A request of a user in this thread; what is asked outside of any has no bounds."""
        here = self.request
        here.user, here.left, here.has = user, self.patience, ()
        try:
            with acting_for(user):
                yield
        finally:
            here.user = None

    @contextmanager
    def charging(self, actor: Actor) -> Iterator[None]:
        """A question or a dry run: its computing time counts, as nothing else bounds it."""
        if not self.bounded or actor.role == ADMIN:
            yield
            return
        name, began = f'{actor.project}/{actor.user}', time.thread_time()
        self.rates.look('cpu_per_user', name)
        try:
            yield
        finally:
            self.rates.add('cpu_per_user', name, time.thread_time() - began)

    @property
    def bounded(self) -> bool:
        return getattr(self.request, 'user', None) is not None

    @contextmanager
    def computing(self, patience: float = 1) -> Iterator[None]:
        """A part of a request that computes for long; it waits a moment for its turn.

        Args:
          patience: seconds

        Raises:
          TooMany: the user has too many of them under way.
          Unavailable: all have.
        """
        here = self.request
        if not self.bounded or here.has:
            yield
            return
        names = ('all', ''), ('user', here.user)
        with self.changed:
            patience = 0 if self.full(WAITS) else patience
            self.taken.update(WAITS)
            free = self.changed.wait_for(lambda: not self.full(names), patience)
            self.taken.subtract(WAITS)
            if not free:
                raise self.refusal(self.full(names))
            self.taken.update(names)
        here.has = names
        try:
            with self.paced():
                yield
        finally:
            here.has = ()
            self.give(names)

    @contextmanager
    def paced(self) -> Iterator[None]:
        """A part of a request that computes for a while: one of them at a time."""
        taken = self.bounded and not db.in_transaction() and self.pace.acquire()
        try:
            yield
        finally:
            if taken:
                self.pace.release()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Lets others compute for as long as this request only waits."""
        paced = self.pace.mine
        if paced:
            self.pace.release()
        try:
            yield
        finally:
            if paced:
                self.pace.acquire()

    def breathe(self) -> None:
        """Lets others compute who wait for that; never inside a transaction."""
        if self.pace.mine and self.pace.lasts() > PIECE:
            with self.resting():
                pass

    def ask(self, target: str, call: Callable):
        """The answer of a call to a target outside, such as `the cloud chameleon`; it may hang.

        Raises:
          TooMany: too many requests of the user take long already.
          Unavailable: too many of all users do.
          CloudError: too many wait for that target, or a request has waited as long as it may.
        """
        here = self.request
        if not self.bounded:
            return call()
        counts = ('target', target), *(() if here.has else (('user', here.user),))
        with self.changed:
            if full := self.full(counts):
                raise self.refusal(full)
        began, asked = time.monotonic(), Outside(call, self.end)
        asked.start()
        try:
            if not asked.ended.wait(min(QUICK, max(here.left, 0))):
                self.wait(asked, counts)
        finally:
            here.left -= time.monotonic() - began
        if not asked.ended.is_set():
            raise CloudError(f'{target} did not answer within the {self.patience:g} seconds that a '
                             'request may wait for clouds and calendars', sure=True)
        if asked.error:
            raise asked.error
        return asked.answer

    def wait(self, asked: Outside, counts: tuple) -> None:
        """Waits for a call that is slow, as long as the request may; it counts until it ends."""
        place = () if self.request.has else (('all', ''),)
        with self.changed:
            full = self.full((*place, *counts))
            if not asked.ended.is_set():
                asked.counts = counts
                self.taken.update(counts)
            if full:
                raise self.refusal(full)
            self.taken.update(place)
        try:
            with self.resting():
                asked.ended.wait(max(self.request.left - QUICK, 0))
        finally:
            self.give(place)

    def end(self, asked: Outside) -> None:
        """Counts a call no longer, however late it has ended."""
        with self.changed:
            asked.ended.set()
            self.give(asked.counts)

    def full(self, names: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
        """The first of some kinds and names of which no more may be."""
        return next((each for each in names if self.taken[each] >= self.most[each[0]]), None)

    def give(self, names: Iterable[tuple[str, str]]) -> None:
        with self.changed:
            self.taken.subtract(names)
            self.taken = +self.taken
            self.changed.notify_all()

    def refusal(self, full: tuple[str, str]) -> Error:
        kind, name = full
        error, sentence = FULL[kind]
        return error(sentence.format(most=self.most[kind], name=name))


# Calendar ####################################################################
#
# iCalendar (RFC 5545) in and out. What comes in is hostile until shown otherwise, and most of it
# wants nothing from us. So it is read a line at a time, and of an event only what is asked for: a
# fault refuses its own event, and only if that matters. No library sees what isn't bounded.

MOST_ICS = MOST_FETCHED  # bytes of a calendar
MOST_TEXT = 20_000      # letters of a text that are looked at
MOST_COMPONENTS = 150_000  # components that are looked at
MOST_TOLD = 20          # refusals of a calendar, each by itself
MOST_HEAD = 4000        # letters of one in which its first line is
MOST_EVENTS = 2000      # that want machines
MOST_DATES = 5000       # RDATEs and EXDATEs of an event, exceptions of a series
MOST_ALIKE = 100        # series of one UID
MOST_ZONE = 50_000      # letters that describe a time zone
MOST_CHANGES = 2000     # of the clocks of one that a part of it describes
MOST_NESTING = 8
MOST_LENGTH = 366 * 86400  # seconds of one occurrence
MOST_STEPS = 300_000    # to follow all events of a calendar: a step is about a microsecond
MOST_STEPS_EACH = 50_000  # of these for one event
MOST_SHOWN_BY_FEED = 100_000
#: What an event wants: 2 x m1.small, and if it likes an image and a resource: 2 x m1.small cirros
#: on demo.
WANT = re.compile(
    r'(\d{1,7})\s*[x×]\s*([^\s,;]+)(?:\s+(?!on\s)([^\s,;]+))?'
    r'(?:\s+on\s+([A-Za-z0-9._-]{1,64}))?\s*', re.I)
MARKED = re.compile(r'#vm\b\s*([^\n<]*)', re.I)
MAYBE_MARKED = re.compile('#vm|&#|&num', re.I)
#: An event of our own feeds: what it shows is booked already.
FEED_UID = re.compile(r'occurrence-\d+@cmres-[0-9a-f]{8}')
PROPERTY = re.compile(r'([A-Za-z0-9-]+)((?:;[^":;]*(?:"[^"]*"[^":;]*)*)*):(.*)', re.S)
TIMES = ('DTSTART', 'DTEND', 'RECURRENCE-ID', 'RDATE', 'EXDATE')
PROGRAMMED = ('FLAVOR', 'IMAGE', 'RESOURCE', 'NETWORK', 'KEY')
KEPT = frozenset((*TIMES, 'UID', 'SUMMARY', 'DESCRIPTION', 'LOCATION', 'CATEGORIES', 'STATUS',
                  'SEQUENCE', 'DURATION', 'RRULE', 'EXRULE', 'X-VM-COUNT',
                  *(f'X-VM-{name}' for name in PROGRAMMED)))
#: No event wants a VM without one of these in its text, maybe folded: #vm, 2 x, 2 &times;, VM.
WISH = re.compile(
    rb'&\x1f?(?:#|num)|#\x1f?[vV]\x1f?[mM]|\n(?i:CATEGORIES)[^\n]*(?i:v\x1f?m)'
    rb'|[\d\x80-\xff](?:[ \t\x1f\x80-\xff]|&[A-Za-z0-9#\x1f]{1,9};)*(?:[xX&]|\xc3\x1f?\x97)')
#: Stands where a line was folded, and counts as one.
FOLD = b'\x1f'
FOLDED_NAME = re.compile(rb'(\n[A-Za-z0-9-]{0,20})(\x1f)([A-Za-z0-9-]{0,20}[;:])')
#: Patterns that begin with the end of the line before are found fast.
STRUCTURE = re.compile(rb'\n(?:([Bb])(?i:EGIN)|[Ee](?i:ND)):([^\n]*)')
KEPT_LINE = re.compile(rb'\n(?i:%b)(?=[;:])[^\n]*' % '|'.join(sorted(KEPT)).encode())
EXCEPTION = re.compile(rb'\n(?i:RECURRENCE-ID)[;:]')
NAMING_LINE = re.compile(rb'\n(?i:DTSTART|SUMMARY)(?=[;:])[^\n]*')
UID_LINE = re.compile(rb'\n(?i:UID)[;:][^\n]*')
REPEATS = re.compile(rb'\n(?i:RRULE|RDATE)[;:]')
FIRST_DAY = re.compile(rb'\n(?i:DTSTART)(?:;[^\n]*)?:(\d{8})')
LAST_DAY = re.compile(rb'\n(?i:DTEND)(?:;[^\n]*)?:(\d{8})')
ZONE_NAME = re.compile(rb'\n(?i:TZID)[^\n:]*:([^\n]*)')
BESIDE = re.compile(rb'\n(?i:X-WR-TIMEZONE)[^\n]*:([^\n]*)')
MOMENT = re.compile(r'(\d{4})(\d\d)(\d\d)(?:T(\d\d)(\d\d)(\d\d)(Z?))?', re.A)
OFFSET = re.compile(r'[+-]([01]\d|2[0-3])[0-5]\d([0-5]\d)?', re.A)


class Want(NamedTuple):
    """What an event of a calendar asks for; '' is for the defaults of the import."""
    vms: int = 1
    flavor: str = ''
    image: str = ''
    resource: str = ''
    network: str = ''
    key: str = ''


class Booking(NamedTuple):
    """All components of one UID, as a series that wants machines."""
    uid: str
    summary: str
    want: Want
    stretches: list      # of resource 0, until it is known
    cancelled: bool
    digest: str          # of its text, without what changes at each look
    name: str = ''       # as a sentence calls it
    error: str = ''      # why it can't be understood
    guess: str = ''      # the flavor in words that only look like a wish

    def why(self, error: Error) -> str:
        """The sentence that refuses it, by its title and date."""
        return str(error) if isinstance(error, BadCalendar) else f'{self.name}: {error}'


class Frame:
    """What stands around the events of a VCALENDAR: zones that it describes or names."""

    def __init__(self, data: bytes):
        self.data, self.beside = data, ''
        self.described: dict[str, tuple[int, int]] = {}
        self.known: dict[str, tzinfo | None] = {}

    def zone(self, name: str) -> tzinfo:
        """The zone of a name, of the zone table rather than of the calendar.

        Raises:
          Invalid: neither knows it; such a time would be read as one without a zone, in silence.
        """
        name = name.strip(' "')
        if name not in self.known:
            self.known[name] = table_zone(name) or described_zone(self.lines_of(name))
        if self.known[name] is None:
            raise Invalid(f'the time zone {shown(name)} is not known, nor described in a way that '
                          'can be followed')
        return self.known[name]

    def lines_of(self, name: str) -> list[str]:
        """What describes a zone."""
        begin, end = self.described.get(name, (0, 0))
        STEPS.take((end - begin) // 10)
        return [plain_line(line) for line in self.data[begin:end].split(b'\n') if line]

    def clock(self) -> tzinfo:
        """The zone by which a series in UTC goes, as Google writes it (X-WR-TIMEZONE)."""
        return self.zone(self.beside) if self.beside else UTC


def table_zone(name: str) -> ZoneInfo | None:
    """A zone by its name in the zone table, maybe behind a path (Evolution), or by that of
    Windows.
    """
    words = name.split('/')
    ends = ('/'.join(words[number:]) for number in range(1, len(words) if not words[0] else 1))
    for each in (name, *ends):
        with suppress(ValueError, OSError, KeyError):
            return ZoneInfo(each)
    from icalendar.timezone.windows_to_olson import WINDOWS_TO_OLSON
    return table_zone(WINDOWS_TO_OLSON[name]) if name in WINDOWS_TO_OLSON else None


class DescribedZone(tzinfo):
    """A zone that a calendar describes: its changes, as instants without their zone."""

    def __init__(self, changes: list[tuple[datetime, timedelta]], before: timedelta):
        self.instants = [at for at, _ in changes]
        self.offsets = [before, *(offset for _, offset in changes)]
        pairs = [*zip(self.instants, itertools.pairwise(self.offsets))]
        # What a clock shows at a change: of an hour that it shows twice its end, or its begin.
        self.walls = [[at + side(pair) for at, pair in pairs] for side in (max, min)]

    def utcoffset(self, moment: datetime | None) -> timedelta | None:
        wall = moment.replace(tzinfo=None, fold=0)
        return self.offsets[bisect_right(self.walls[moment.fold], wall)]

    def dst(self, moment: datetime | None) -> timedelta | None:
        return None

    def tzname(self, moment: datetime | None) -> str:
        return 'local'

    def fromutc(self, moment: datetime) -> datetime:
        at = moment.replace(tzinfo=None)
        number = bisect_right(self.instants, at)
        wall = at + self.offsets[number]
        return wall.replace(tzinfo=self, fold=number and wall < self.walls[0][number - 1])


def described_zone(lines: list[str]) -> tzinfo | None:
    """The zone that a VTIMEZONE describes; None if it can't be followed in reasonable time."""
    try:
        parts = [*observances(lines)]
        changes = sorted(change for part in parts for change in changes_of(part))
        standard = next((part for part in parts if part['BEGIN'] == ['STANDARD']), parts[0])
        return DescribedZone(changes, read_offset(standard['TZOFFSETTO'][0]))
    except (Error, ValueError, LookupError, OverflowError):
        return None


def observances(lines: list[str]) -> Iterator[dict[str, list[str]]]:
    """The parts of a VTIMEZONE (RFC 5545, 3.6.5), as values by names.

    Raises:
      ValueError: it is cut off.
    """
    part: dict[str, list[str]] = {}
    if not lines or lines[-1].strip().upper() != 'END:VTIMEZONE':
        raise ValueError(lines[-1:])
    for name, _, value in filter(None, map(read_property, lines)):
        value = value.strip()
        if name == 'BEGIN':
            part = defaultdict(list)
        elif name == 'END' and value.upper() in ('STANDARD', 'DAYLIGHT'):
            yield part
        part[name].append(value.upper())


def changes_of(part: dict[str, list[str]]) -> Iterator[tuple[datetime, timedelta]]:
    """The changes to the offset of a part; ValueError for offsets of days and rules that take
    long.
    """
    before, offset = (read_offset(part[name][0]) for name in ('TZOFFSETFROM', 'TZOFFSETTO'))
    start = zone_wall(part['DTSTART'][0])
    dates = [each.partition('/')[0] for values in part.get('RDATE', ())
             for each in values.split(',')]
    STEPS.take(5 * len(dates))
    walls = {start, *map(zone_wall, dates)}
    for rule in part.get('RRULE', ()):
        ruled = [*itertools.islice(zone_walls(rule, start), MOST_CHANGES)]
        STEPS.take(len(ruled))
        walls.update(ruled)
    if len(walls) >= MOST_CHANGES:
        raise ValueError(len(walls))
    return ((wall - before, offset) for wall in walls)


def zone_wall(text: str) -> datetime:
    """A local time of a VTIMEZONE."""
    match = MOMENT.fullmatch(text.strip())
    if not match:
        raise ValueError(text)
    return datetime(*(int(each or 0) for each in match.groups()[:6]))


def zone_walls(rule: str, start: datetime) -> Iterator[datetime]:
    """The wall times of a rule of a VTIMEZONE."""
    parts = parts_of(checked_rule(re.sub(r'\s', '', rule)))
    if parts['FREQ'] != 'YEARLY':
        raise ValueError(rule)
    if 'UNTIL' in parts:  # it is an instant; by the clock a day more holds no other change
        parts['UNTIL'] = f"{read_until(parts['UNTIL']) + timedelta(days=1):%Y%m%dT%H%M%S}"
    return followed(';'.join('='.join(each) for each in parts.items()), start, start)


def read_offset(text: str) -> timedelta:
    """A TZOFFSETFROM or TZOFFSETTO."""
    if not OFFSET.fullmatch(text):
        raise ValueError(text)
    hours, minutes, seconds = (int(text[at:at + 2] or 0) for at in (1, 3, 5))
    length = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    return -length if text[0] == '-' else length


def read_property(line: str) -> tuple[str, str, str] | None:
    """A content line (RFC 5545, 3.1) as name, parameters and value; None if it is none."""
    name = re.match('[A-Za-z0-9-]*', line)[0].upper()
    if name in TIMES:  # their values have no colon, but some zones do, without quotes
        head, colon, value = line.rpartition(':')
        return (name, head[len(name):], value) if colon else None
    match = PROPERTY.fullmatch(line[:2 * MOST_TEXT])
    return (name, match[2], match[3]) if match else None


class Moment(NamedTuple):
    """A time of a calendar: what its clock shows, and in which zone; None is that of its owner."""
    wall: datetime
    zone: tzinfo | None = None
    whole: bool = False  # a day

    def at(self, owner: tzinfo) -> datetime:
        return from_wall(self.wall, self.zone or owner)


def read_moment(text: str, parameters: str, frame: Frame) -> Moment:
    """A DATE or DATE-TIME (RFC 5545, 3.3.4 and 3.3.5); of a day no zone counts.

    Raises:
      Invalid: it is none, or in a zone that nobody knows.
    """
    match = MOMENT.fullmatch(text.strip())
    try:
        *numbers, second = (int(each or 0) for each in match.groups()[:6])
        wall = datetime(*numbers, min(second, 59))  # a leap second
    except (AttributeError, ValueError):
        raise Invalid(f'{shown(text)} is no time; it should be such as 20270301T090000Z') from None
    if not 1 < wall.year < LAST.year:
        raise Invalid(f'the time {wall} is not before the year {LAST.year}')
    if match[4] is None:
        return Moment(wall, None, True)
    if match[7]:
        return Moment(wall, UTC)
    name = re.search('(?i);TZID=("[^"]*"|[^;]*)', parameters)
    named = name[1] if name else frame.beside
    return Moment(wall, frame.zone(named) if named else None)


def read_length(text: str) -> timedelta:
    """A DURATION (RFC 5545, 3.3.6) that is not negative."""
    plain = text.strip().removeprefix('+')
    if not plain.upper().startswith('P'):
        raise Invalid(f'{shown(text)} is no length; it should be such as PT2H')
    return parse_duration(plain)


class Entry:
    """A VEVENT as it stands in a calendar; what it says is read only when it is asked for."""

    def __init__(self, line: int, frame: Frame):
        self.line, self.frame = line, frame
        self.pieces: list[tuple[int, int]] = []  # without the components in it

    @functools.cached_property
    def said(self) -> dict[str, list[tuple[str, str]]]:
        """Parameters and values of what may be asked for, by names."""
        return self.read(KEPT_LINE, MOST_DATES)

    def read(self, pattern: re.Pattern, most: int) -> dict[str, list[tuple[str, str]]]:
        """What the first lines of a kind say."""
        found: dict = defaultdict(list)
        lines = (match[0] for piece in self.pieces
                 for match in pattern.finditer(self.frame.data, *piece))
        for line in itertools.islice(lines, most):
            STEPS.take(2)
            if read := read_property(plain_line(line)):
                found[read[0]].append(read[1:])
        return found

    def holds(self, pattern: re.Pattern) -> bool:
        """Whether its text as it stands there has something."""
        return any(pattern.search(self.frame.data, *piece) for piece in self.pieces)

    def outside(self, first: str, last: str) -> bool:
        """Whether it is once, and plainly ends before a day or starts after another."""
        data = self.frame.data
        begin, end = ([match[1].decode() for piece in self.pieces
                       for match in pattern.finditer(data, *piece)]
                      for pattern in (FIRST_DAY, LAST_DAY))
        plain = len(begin) == len(end) == 1 and not self.holds(REPEATS) and not self.exception
        return plain and (end[0] < first or last < begin[0])

    def one(self, name: str) -> tuple[str, str]:
        """Parameters and value of what may be there once; both '' without it."""
        found = self.said.get(name, [('', '')])
        if len(found) > 1:
            raise Invalid(f'it has more than one {name}')
        return found[0]

    def text(self, name: str) -> str:
        """The first of a text, without what is for machines only; '' without it."""
        return unescaped(self.said.get(name, [('', '')])[0][1])

    def moment(self, name: str) -> Moment:
        parameters, value = self.one(name)
        return read_moment(value, parameters, self.frame)

    def listed(self, name: str) -> Iterator[tuple[Moment, Moment | timedelta | None]]:
        """The times of RDATE or EXDATE, with the end or the length of periods (RFC 5545, 3.3.9)."""
        for parameters, values in self.said.get(name, ()):
            for value in filter(str.strip, values.split(',')):
                STEPS.take(10)
                begin, _, end = value.partition('/')
                timed = end.strip()[:1].isdigit()
                yield (read_moment(begin, parameters, self.frame), None if not end else
                       read_moment(end, parameters, self.frame) if timed else read_length(end))

    @functools.cached_property
    def start(self) -> Moment:
        if 'DTSTART' not in self.said:
            raise Invalid('it has no DTSTART')
        return self.moment('DTSTART')

    @functools.cached_property
    def length(self) -> timedelta:
        """By wall clocks; without an end a day for a date, nothing for a time (RFC 5545, 3.6.1)."""
        if 'DTEND' in self.said:
            end, zone = self.moment('DTEND'), self.start.zone
            if zone and end.zone and end.zone is not zone:
                end = Moment(to_wall(end.at(zone), zone))
            if end.wall < self.start.wall:
                raise Invalid(f'it ends at {end.wall}, before it begins')
            return end.wall - self.start.wall
        if 'DURATION' in self.said:
            return read_length(self.one('DURATION')[1])
        return timedelta(days=self.start.whole)

    @property
    def lengths(self) -> tuple[int, int]:
        """Its length by the clocks, and the exact one after that: the hours of a DURATION are
        exact.
        """
        nominal = int(getattr(self.length, 'nominal', self.length.total_seconds()))
        return nominal, int(self.length.total_seconds()) - nominal

    @property
    def exception(self) -> bool:
        """Whether it is an occurrence of a series that is otherwise, or the rest of it."""
        return self.holds(EXCEPTION)

    @property
    def repeats(self) -> bool:
        return 'RRULE' in self.said or 'RDATE' in self.said

    @property
    def status(self) -> str:
        return self.text('STATUS').strip().upper() or 'CONFIRMED'

    @property
    def sequence(self) -> int:
        number = self.text('SEQUENCE').strip()
        return int(number) if re.fullmatch('[0-9]{1,9}', number) else 0

    @functools.cached_property
    def uid(self) -> str:
        """Its UID; for one without it a name by its start and title, which stays while they do."""
        named = self.read(UID_LINE, 1).get('UID', [('', '')])
        if uid := unescaped(named[0][1]).strip():
            return uid
        said = self.read(NAMING_LINE, 9)
        named = repr([said.get(name) for name in ('DTSTART', 'SUMMARY')])
        return f'without-uid-{hashlib.sha256(named.encode()).hexdigest()[:12]}'

    @property
    def name(self) -> str:
        """What a sentence calls it, so that its owner finds it."""
        title = re.sub('[\x00-\x20\x7f]+', ' ', self.text('SUMMARY')[:400])
        title = ' '.join(title.split()) or self.uid
        title = textwrap.shorten(title, 80) if len(title) > 80 else title
        day = re.match(r'(\d{4})(\d\d)(\d\d)', self.said.get('DTSTART', [('', '')])[0][1])
        return f"the event '{title}'" + (
            f" of {'-'.join(day.groups())}" if day else '') + f' (line {self.line})'


def unescaped(text: str) -> str:
    """A TEXT (RFC 5545, 3.3.11) as it is meant."""
    text = text[:MOST_TEXT].replace('\\\\', '\0').replace('\\n', '\n').replace('\\N', '\n')
    return text.replace('\\,', ',').replace('\\;', ';').replace('\0', '\\')


@contextmanager
def naming(entry: Entry) -> Iterator[None]:
    """Makes BadCalendar of what is wrong with an event, and names it."""
    try:
        yield
    except BadCalendar:
        raise
    except (Error, ValueError, OverflowError) as error:  # numbers may be too large for any clock
        raise BadCalendar(f'{entry.name}: {first_line(error)}') from None


def read_calendar(text: str, what: str = 'this') -> list[Entry]:
    """The events of the calendars in a text, as they stand there.

    Raises:
      BadCalendar: it is none, is cut short, or is larger than MOST_ICS.
    """
    data = unfolded(guarded_text(text, what))
    reader = Reader(what, data)
    for number, match in enumerate(STRUCTURE.finditer(data)):
        reader.take(match)
        if number > 2 * MOST_COMPONENTS:
            raise BadCalendar(f'{what} has more than {MOST_COMPONENTS} components')
    if reader.path:
        raise BadCalendar(f'{what} is cut short: it does not end with END:VCALENDAR')
    return reader.entries


def guarded_text(text: str, what: str) -> bytes:
    """The bytes of what may be a calendar; what is no UTF-8 only spoils its own text."""
    data = text.encode('utf8', 'surrogateescape').removeprefix(b'\xef\xbb\xbf').strip()
    if len(data) > MOST_ICS:
        raise BadCalendar(f'{what} is larger than {MOST_ICS} bytes')
    if not data[:15].upper().startswith(b'BEGIN:VCALENDAR'):
        begins = shown(data[:20].decode('utf8', 'replace'))
        raise BadCalendar(f'{what} is not iCalendar: it begins with {begins}, '
                          'not with BEGIN:VCALENDAR')
    return data


def unfolded(data: bytes) -> bytes:
    """A calendar with each property on a line, FOLD where it had a fold (RFC 5545, 3.1).

    An end of line stands before the first and behind the last. A fold may be within a letter, and
    even within a name.
    """
    for old, new in ((FOLD, b''), (b'\r\n', b'\n'), (b'\n ', FOLD), (b'\n\t', FOLD)):
        data = data.replace(old, new)
    return FOLDED_NAME.sub(rb'\1\3\2', b'\n%b\n' % data, MOST_DATES)


def plain_line(line: bytes) -> str:
    return line.replace(FOLD, b'').strip(b'\r\n').decode('utf8', 'replace')


class Reader:
    """Takes a calendar a component at a time; what is neither event nor zone is passed over."""

    def __init__(self, what: str, data: bytes):
        self.what, self.data = what, data
        self.path, self.entries = [], []
        self.frame, self.zone = Frame(data), 0
        self.behind, self.line = 0, 0

    def take(self, match: re.Match) -> None:
        """Takes a line that begins or ends a component, and what stands before it."""
        begin, end = match.span()
        self.keep(self.behind, begin)
        self.line += self.data.count(b'\n', self.behind, end)
        self.line += self.data.count(FOLD, self.behind, end)
        self.behind = end
        kind = plain_line(match[2]).strip().upper()
        if match[1]:
            self.begin(kind, begin)
        else:
            self.end(kind, end)

    def begin(self, kind: str, at: int) -> None:
        self.end(kind, at)  # no component is within its like: an end is missing
        if not self.path and kind != 'VCALENDAR':  # behind the end of the calendar
            return
        self.path.append(kind)
        if len(self.path) > MOST_NESTING:
            raise BadCalendar(f'{self.what} has components nested more than {MOST_NESTING} deep')
        if kind == 'VCALENDAR':
            self.frame = Frame(self.data)
        elif kind == 'VEVENT':
            self.entries.append(Entry(self.line, self.frame))
        elif kind == 'VTIMEZONE':
            self.zone = at

    def end(self, kind: str, at: int) -> None:
        """Ends the component of a kind that is open, with all that was left open in it."""
        if kind in self.path:
            del self.path[len(self.path) - 1 - self.path[::-1].index(kind):]
            if kind == 'VTIMEZONE' and (name := ZONE_NAME.search(self.data, self.zone, at)):
                named = plain_line(name[1]).strip(' "')
                self.frame.described[named] = self.zone, min(at, self.zone + MOST_ZONE)

    def keep(self, begin: int, end: int) -> None:
        """Keeps the lines between two components where they may be asked for."""
        kind = self.path[-1] if end > begin and self.path else ''
        if kind == 'VEVENT':
            self.entries[-1].pieces.append((begin, end))
        elif kind == 'VCALENDAR' and (beside := BESIDE.search(self.data, begin, end)):
            self.frame.beside = plain_line(beside[1]).strip()


def by_uid(entries: list[Entry]) -> dict[str, list[Entry]]:
    """The events by UID, each series before its exceptions; of versions of one the newest.

    Two of one UID that are no versions of each other are told apart by a number: both are wanted.
    """
    groups: dict = defaultdict(list)
    for entry in entries:
        groups[entry.uid].append(entry)
    return {key: group for uid, found in groups.items() for key, group in told_apart(uid, found)}


def wishful(entries: list[Entry]) -> list[Entry]:
    """The events of those UIDs of which one may want VMs: what has no wish needs no reading."""
    uids = {entry.uid for entry in entries if entry.holds(WISH)}
    return [entry for entry in entries if entry.uid in uids]


def near_window(entries: list[Entry], begin: datetime, until: datetime) -> list[Entry]:
    """The events without those that are plainly before or after a window: most of a long life."""
    uids = Counter(entry.uid for entry in entries)
    days = [f'{day:%Y%m%d}' for day in (begin - timedelta(days=2), until + timedelta(days=2))]
    return [entry for entry in entries if uids[entry.uid] > 1 or not entry.outside(*days)]


def told_apart(uid: str, found: list[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    if len(found) == 1:
        yield uid, found
        return
    exceptions = [each for each in found if each.exception]
    newest = max((each.sequence for each in found if not each.exception), default=0)
    masters = [*{str(each.said.get('DTSTART')): each for each in found
                 if not each.exception and each.sequence == newest}.values()]
    if len(masters) > MOST_ALIKE:
        yield uid, masters + exceptions
        return
    yield uid, masters[:1] + exceptions
    for number, master in enumerate(masters[1:], 2):
        yield f'{uid} ({number})', [master]


class Clock(NamedTuple):
    """By what a series goes."""
    first: Moment    # its first start
    here: tzinfo     # the zone of its wall times
    owner: tzinfo    # that of times that name none
    days: tzinfo     # that of times in whole-day series, as Exchange writes them

    def wall(self, moment: Moment) -> datetime:
        """What the clock of the series shows at a time."""
        if (moment.zone or self.owner) is self.here:
            return moment.wall
        return to_wall(moment.at(self.owner), self.here)

    def slot(self, moment: Moment) -> datetime:
        """The slot that a RECURRENCE-ID, RDATE or EXDATE names; in a series of days a day."""
        if self.first.whole:
            day = to_wall(moment.at(UTC), self.days) if moment.zone is UTC else moment.wall
            return at_midnight(day)
        return self.wall(moment) if moment.zone else moment.wall


def clock_of(entries: list[Entry], owner: tzinfo) -> Clock:
    """The clock of a series and its exceptions."""
    head = entries[0]
    here = head.start.zone or owner
    if here is UTC and (head.repeats or len(entries) > 1):
        here = head.frame.clock()
    days = owner
    if head.start.whole:
        named = [each.moment('RECURRENCE-ID') for each in entries if each.exception]
        named += [moment for moment, _ in head.listed('EXDATE')]
        days = next((each.zone for each in named if each.zone not in (None, UTC)), owner)
    return Clock(head.start, here, owner, days)


def rule_of(entry: Entry, clock: Clock) -> str:
    """The rule of a series, its UNTIL a wall time; '' without one."""
    rule = re.sub(r'\s', '', entry.one('RRULE')[1]).upper()
    if 'EXRULE' in entry.said:
        raise Invalid('it has an EXRULE, which no longer is iCalendar')
    if not rule:
        return ''
    rule = re.sub('(?<=UNTIL=)[^;]*', lambda until: plain_until(until[0], clock),
                  checked_rule(rule))
    start = clock.wall(clock.first)
    if UNEVEN & set(parts_of(rule)) and not next(followed(endless(rule), start, start), None):
        raise Invalid(f'its rule {rule} never matches')
    return local_rule(rule, clock.here)


def plain_until(text: str, clock: Clock) -> str:
    """The end of a rule as programs mean it: in a series of days a day, in a zone an instant."""
    last = read_until(text)
    if 'T' not in text:
        return text
    if clock.first.whole:
        if f'{last:%H%M%S}' not in ('000000', '235959'):  # else it is a day, and no instant
            last = to_wall(last.replace(tzinfo=UTC), clock.days)
        return f'{last:%Y%m%d}'
    return text if text.endswith('Z') or clock.first.zone is None else f'{text}Z'


class Timetable(NamedTuple):
    """When the events of one UID occur: stretches by a zone, and the status of slots."""
    stretches: list[Stretch]
    zone: tzinfo
    usual: str               # status of a slot
    status: dict[str, str]   # of those that are otherwise

    def slots(self, begin: float, until: float) -> list[Slot]:
        return all_slots(self.stretches, begin, until, self.zone)


def timetable(entries: list[Entry], owner: tzinfo,
              vms: Callable[[Entry], int] = lambda entry: 1) -> Timetable:
    """When a series and its exceptions occur, cancelled ones too.

    Raises:
      Error: one of them can't be understood; BadCalendar names it.
    """
    STEPS.take(30)
    if sum(not entry.exception for entry in entries) > 1:
        raise Invalid(f'more than {MOST_ALIKE} events have its UID')
    refuse_too_many_dates(entries)
    head, clock = entries[0], clock_of(entries, owner)
    stretches = [plain_stretch(head, clock, vms(head))]
    exceptions = exceptions_of(entries, clock)
    if head.exception:  # without their series they are all there is
        keys = tuple(sorted(exceptions))
        exceptions = exceptions if len(keys) > 1 else {}
        stretches = [stretches[0]._replace(dates=keys if len(keys) > 1 else ())]
    stretches = overridden(stretches, exceptions, clock, vms)
    return Timetable(stretches, clock.here, head.status,
                     {key: entry.status for key, entry in exceptions.items()})


def refuse_too_many_dates(entries: list[Entry]) -> None:
    """Raises Invalid for more than MOST_DATES of them, before any is read."""
    head = entries[0]
    lists = (values for name in ('RDATE', 'EXDATE') for _, values in head.said.get(name, ()))
    if sum(values.count(',') + 1 for values in lists) + len(entries) > MOST_DATES:
        raise Invalid(f'it has more than {MOST_DATES} dates and exceptions')


def exceptions_of(entries: list[Entry], clock: Clock) -> dict[str, Entry]:
    """Exceptions by slots; of two for one that with the higher SEQUENCE, else the later."""
    found = {}
    for entry in sorted(entries, key=lambda each: each.sequence):
        if entry.exception:
            STEPS.take(20)
            with naming(entry):
                found[clock.slot(entry.moment('RECURRENCE-ID')).isoformat()] = entry
    return found


def plain_stretch(entry: Entry, clock: Clock, vms: int) -> Stretch:
    """A series as if it had no exceptions."""
    first, (length, exact) = clock.wall(entry.start).isoformat(), entry.lengths
    name = 'UTC' if clock.here is UTC else getattr(clock.here, 'key', '')
    if entry.exception:
        return Stretch(first, length, name, vms, 0, exact=exact)
    rule, dates = rule_of(entry, clock), tuple(added_dates(entry, clock))
    skips = tuple(clock.slot(moment).isoformat()[:10 if moment.whole or clock.first.whole else None]
                  for moment, _ in entry.listed('EXDATE'))
    dates = (first, *dates) if rule or dates else ()
    return Stretch(first, length, name, vms, 0, rule, dates, skips, exact=exact)


def added_dates(entry: Entry, clock: Clock) -> Iterator[str]:
    """The slots of RDATE; a period has its length in seconds behind a slash."""
    for moment, end in entry.listed('RDATE'):
        wall = clock.slot(moment)
        until = clock.wall(end) if isinstance(end, Moment) else wall + end if end else None
        if until and until < wall:
            raise Invalid(f'its RDATE ends at {until}, before it begins')
        length = f'/{int((until - wall).total_seconds())}' if until else ''
        yield f'{wall.isoformat()}{length}'


def overridden(stretches: list[Stretch], exceptions: dict[str, Entry], clock: Clock,
               vms: Callable[[Entry], int]) -> list[Stretch]:
    """A series with its exceptions: moved, or with RANGE=THISANDFUTURE otherwise from there on."""
    moved = {}
    for key, entry in sorted(exceptions.items()):
        with naming(entry):
            start, (length, exact) = clock.wall(entry.start), entry.lengths
            rest = 'RANGE=THISANDFUTURE' in entry.one('RECURRENCE-ID')[0].upper()
            if rest and is_ruled(stretches[-1], key):
                STEPS.take(5 * len(stretches))
                stretches, moved = with_moved(stretches, moved), {}
                stretches = following(stretches, key, entry, start, length=length, exact=exact,
                                      vms=vms(entry))
            else:
                moved[key] = start.isoformat(), length, vms(entry), exact
    return with_moved(stretches, moved)


def with_moved(stretches: list[Stretch], moved: dict[str, tuple]) -> list[Stretch]:
    """A series of which some occurrences are otherwise, even where the rule has no slot."""
    found = []
    for stretch in stretches:
        dates = stretch.dates or (stretch.start,)
        more = tuple(sorted(moved.keys() - {*dates}))
        found.append(stretch._replace(moved=stretch.moved | moved,
                                      dates=(*dates, *more) if more else stretch.dates))
    return found


def is_ruled(stretch: Stretch, key: str) -> bool:
    """Whether a slot is one of a rule; what was added by hand has none that follow."""
    start, wall = datetime.fromisoformat(stretch.start), datetime.fromisoformat(key)
    return wall == start or bool(stretch.rule) and on_rule(stretch.rule, start, wall)


def following(stretches: list[Stretch], key: str, entry: Entry, start: datetime,
              **changes) -> list[Stretch]:
    """A series that is otherwise from a slot on, or over."""
    if entry.status == 'CANCELLED':
        return [each._replace(until=min(each.until or key, key)) for each in stretches]
    last, shift = stretches[-1], start - datetime.fromisoformat(key)
    if day := re.search(r'UNTIL=(\d{8}T235959)', last.rule):  # after that day nothing begins
        end = (read_until(day[1]) - shift + timedelta(seconds=1)).isoformat()
        stretches = [*stretches[:-1], last._replace(until=min(last.until or end, end))]
    return cut_stretches(stretches, key, shift=int(shift.total_seconds()) - last.shift, **changes)


def occurrences_of(entries: list[Entry], owner: ZoneInfo, begin: datetime,
                   until: datetime) -> tuple[list[dict], list[BadCalendar]]:
    """The occurrences in a window, and why some events have none; bare times are the owner's.

    Raises:
      BadCalendar: they are too many.
    """
    found, refused, budget = [], [], Budget()
    for group in simple_first(by_uid(near_window(entries, begin, until)).values()):
        try:
            with naming(group[0]), budget.event(may_repeat(group)):
                found += group_occurrences(group, owner, begin, until)
        except BadCalendar as error:
            refused.append(error)
        if len(found) > 10 * MOST_OCCURRENCES:
            raise BadCalendar(f'there are too many occurrences from {begin:%Y-%m-%d} to '
                              f'{until:%Y-%m-%d}; '
                              'ask for a shorter window')
    return sorted(found, key=lambda each: (each['start'], each['end'], each['uid'])), refused


def simple_first(groups: Iterable[list[Entry]]) -> list[list[Entry]]:
    """The events of UIDs, those first that don't repeat."""
    return sorted(groups, key=may_repeat)


def may_repeat(group: list[Entry]) -> bool:
    return len(group) > 1 or group[0].holds(REPEATS)


class Budget:
    """What the events of a calendar may cost in steps: each by itself, and all together.

    What doesn't repeat has steps of its own, that nothing else can use up.
    """

    def __init__(self):
        self.left = {False: 5 * MOST_STEPS, True: MOST_STEPS}

    @contextmanager
    def event(self, repeats: bool) -> Iterator[None]:
        """Bounds what is done for one event; Invalid where nothing is left for it."""
        if self.left[repeats] <= 0:
            raise Invalid('it is too much beside the other events of its calendar; '
                          'put it into a calendar of its own')
        began = STEPS.taken
        try:
            with STEPS.at_most(MOST_STEPS_EACH):
                yield
        finally:
            self.left[repeats] -= STEPS.taken - began


def group_occurrences(group: list[Entry], owner: ZoneInfo, begin: datetime,
                      until: datetime) -> list[dict]:
    """The occurrences of one UID in a window; one without length is in it if it begins there."""
    table = timetable(group, owner)
    return [{'uid': group[0].uid, 'start': instant(slot.start), 'end': instant(slot.end),
             'status': table.status.get(slot.key, table.usual)}
            for slot in table.slots(begin.timestamp() - 1, until.timestamp())
            if slot.end > begin.timestamp() or slot.start == slot.end >= begin.timestamp()]


def bookings(groups: dict[str, list[Entry]], owner: ZoneInfo, begin: datetime, until: datetime,
             defaults: Want) -> list[Booking]:
    """What the events of calendars want, those that want nothing left out unread.

    Args:
      groups: the events by UID
      owner: the zone of times without one
      begin, until: the window that a series in a zone of its own making is spelled out for
    """
    found, uids, budget = {}, {id(group): uid for uid, group in groups.items()}, Budget()
    for group in simple_first(groups.values()):
        uid = uids[id(group)]
        if FEED_UID.fullmatch(uid):
            continue
        more = len(found) >= MOST_EVENTS
        booking = booking_of(uid, group, owner, begin, until, defaults, budget, more)
        if booking:  # else it wants nothing
            found[uid] = booking
    return [found[uid] for uid in groups if uid in found]


def booking_of(uid: str, group: list[Entry], owner: ZoneInfo, begin: datetime, until: datetime,
               defaults: Want, budget: Budget, too_many: bool = False) -> Booking | None:
    """What the events of one UID want; what they say badly refuses them alone."""
    head = group[0]
    try:
        with naming(head), budget.event(may_repeat(group)):
            wants = wants_of(group, defaults)
            group = [each for each in group if each.line in wants]
            if not group:
                return None
            head = group[0]
            if too_many:
                raise Invalid(f'its calendar has more than {MOST_EVENTS} events that ask for VMs; '
                              'put it into a calendar of its own')
            table = timetable(group, owner, lambda entry: wants[entry.line].vms)
            stretches, cancelled = wanted_stretches(table, group, begin, until)
        return Booking(uid, title_of(head), wants[head.line], stretches, cancelled,
                       digest_of(group), head.name, guess=guessed(head))
    except BadCalendar as error:
        return Booking(uid, title_of(head), defaults, [], False, '', head.name, str(error),
                       guessed(head))


def title_of(entry: Entry) -> str:
    return re.sub(f'(?:{UNSEEN.pattern}|\\s)+', ' ', entry.text('SUMMARY'))[:1000]


def wants_of(group: list[Entry], defaults: Want) -> dict[int, Want]:
    """What events want, by their lines; exceptions as their series unless they say."""
    wants: dict[int, Want] = {}
    head = group[0]
    for entry in group:
        with naming(entry):
            if want := want_of(entry, wants.get(head.line, defaults)) or wants.get(head.line):
                wants[entry.line] = want
    kinds = {want._replace(vms=1) for want in wants.values()}
    if len(kinds) > 1:
        raise BadCalendar(f'{head.name}: not all of its occurrences want the same flavor, image '
                          'and resource; make those that want another an event of their own')
    return wants


def wanted_stretches(table: Timetable, group: list[Entry], begin: datetime,
                     until: datetime) -> tuple[list[Stretch], bool]:
    """The stretches of a series without what is cancelled, and whether all of it is."""
    gone = [key for key in table.status if table.status[key] == 'CANCELLED']
    stretches, cancelled = table.stretches, table.usual == 'CANCELLED'
    if cancelled and len(gone) < len(table.status):  # exceptions are events of their own
        left = tuple(key for key in table.status if key not in gone)
        stretches, cancelled = [stretches[0]._replace(rule='', dates=left, skips=())], False
    elif group[0].exception and table.status:
        cancelled = len(gone) == len(table.status)
    if gone:
        stretches = [stretch._replace(skips=(*stretch.skips, *gone)) for stretch in stretches]
    longest = max(length for stretch in stretches for length in lengths_of(stretch))
    if longest > MOST_LENGTH:
        raise Invalid(f'it is {format_duration(longest)} long; up to {MOST_LENGTH // 86400} days '
                      'are possible')
    if not stretches[0].zone:
        stretches = spelled_out(table._replace(stretches=stretches), begin, until)
    return stretches, cancelled


def lengths_of(stretch: Stretch) -> list[int]:
    """All lengths of its occurrences, in seconds."""
    periods = (int(each.partition('/')[2]) for each in stretch.dates if '/' in each)
    moved = (each[1] + sum(each[3:]) for each in stretch.moved.values())
    return [stretch.length + stretch.exact, *moved, *periods]


def spelled_out(table: Timetable, begin: datetime, until: datetime) -> list[Stretch]:
    """A series in a zone that only its calendar describes, as the list of what is in a window."""
    found = table.slots(begin.timestamp(), until.timestamp())
    if not found:
        return []
    walls = [to_wall(instant(slot.start), UTC).isoformat() for slot in found]
    dates = tuple(f'{wall}/{slot.end - slot.start}' for wall, slot in zip(walls, found))
    moved = {wall: (wall, slot.end - slot.start, slot.vms) for wall, slot in zip(walls, found)
             if slot.vms != found[0].vms}
    return [Stretch(walls[0], found[0].end - found[0].start, 'UTC', found[0].vms, 0,
                    dates=() if table.stretches[0].single else dates, moved=moved)]


def digest_of(group: list[Entry]) -> str:
    """By what a change of events is known; SEQUENCE alone is none."""
    said = [sorted((name, each.said[name]) for name in each.said if name != 'SEQUENCE')
            for each in group]
    return hashlib.sha256(repr(said).encode('utf8', 'surrogatepass')).hexdigest()


def plain_text(text: str) -> str:
    """A text without the tags and entities of HTML; each tag begins a line."""
    if re.search('[<&]', text):
        text = unescape(re.sub('<[^<>]*>', '\n', text))
    return text.strip()


def marks_of(entry: Entry) -> list[re.Match]:
    """Where an event says in so many words that it wants machines."""
    texts = [entry.text('SUMMARY'), entry.text('DESCRIPTION')]
    texts[1:] = map(plain_text, filter(MAYBE_MARKED.search, texts[1:]))
    return [*filter(None, map(MARKED.search, texts))]


def spoken(entry: Entry) -> re.Match | None:
    """What looks like a wish in the first line of its description, or as its place."""
    text, place = (plain_text(entry.text(name)[:MOST_HEAD]) for name in ('DESCRIPTION', 'LOCATION'))
    lines = (line.strip() for line in (text.partition('\n')[0], place) if len(line) < 500)
    return next(filter(None, map(WANT.fullmatch, lines)), None)


def guessed(entry: Entry) -> str:
    """The flavor in words that look like a wish; '' where it is said that there is one."""
    said = None if marks_of(entry) else spoken(entry)
    return said[2] if said else ''


def want_of(entry: Entry, defaults: Want) -> Want | None:
    """What an event says that it wants; None if it wants no machines."""
    for match in marks_of(entry):
        said = WANT.fullmatch(match[1].strip())
        if not said and match[1].strip():
            raise Invalid(f'{shown(match[0][:80])} is not such as #vm 2 x m1.small')
        return spoken_want(said, defaults) if said else defaults
    if said := spoken(entry):
        return spoken_want(said, defaults)
    return programmed_want(entry, defaults) if 'VM' in categories_of(entry) else None


def spoken_want(said: re.Match, defaults: Want) -> Want:
    vms, flavor, image, resource = said.groups()
    flavor, image = read_name(flavor), read_name(image or '')
    return defaults._replace(vms=read_count(vms), flavor=flavor, image=image or defaults.image,
                             resource=resource or defaults.resource)


def programmed_want(entry: Entry, defaults: Want) -> Want:
    """CATEGORIES:VM and X-VM-COUNT, X-VM-FLAVOR, X-VM-IMAGE, X-VM-RESOURCE, X-VM-NETWORK,
    X-VM-KEY.
    """
    said = {name: entry.text(f'X-VM-{name}') for name in PROGRAMMED if f'X-VM-{name}' in entry.said}
    vms = read_count(entry.text('X-VM-COUNT') or str(defaults.vms))
    return defaults._replace(vms=vms,
                             **{name.lower(): read_name(value) for name, value in said.items()})


def categories_of(entry: Entry) -> list[str]:
    values = (value for _, value in entry.said.get('CATEGORIES', ()))
    return [name.strip().upper() for value in values for name in value.split(',')]


def days_of(entries: list[Entry], zone: ZoneInfo, begin: datetime,
            until: datetime) -> tuple[list[str], list[str]]:
    """The days of all-day events in a window, as skips of a series; why some have none."""
    days, (found, refused) = set(), occurrences_of(entries, zone, begin, until)
    for each in found:
        first, last = to_wall(each['start'], zone), to_wall(each['end'], zone)
        if first.time() == last.time() == datetime.min.time() and each['status'] != 'CANCELLED':
            days |= {(first + timedelta(days=n)).date().isoformat()
                     for n in range((last - first).days)}
    return sorted(days), [str(error) for error in refused]


def calendar_name(text: str, number: int = 0) -> str:
    """A label out of a title: its letters and digits."""
    import unicodedata
    plain = unicodedata.normalize('NFKD', text).encode('ascii', 'ignore').decode().lower()
    name = re.sub('[^a-z0-9._-]+', '-', MARKED.sub('', plain)).strip('-.')[:56] or 'event'
    name = f'{name}-event' if name in NO_LABELS else name
    return f'{name}-{number}' if number else name


class Shown(NamedTuple):
    """What a feed shows of an occurrence; equal ones are written once."""
    uid: str
    start: int
    end: int
    revision: int
    revised: int
    summary: str
    description: str
    location: str
    status: str


@functools.lru_cache(20_000)
def event_text(shown: Shown) -> str:
    """The VEVENT of an occurrence (RFC 5545, 3.6.1), in UTC; its times of change are those of the
    occurrence.
    """
    times = shown.start, shown.end, shown.revised
    start, end, changed = (f'{instant(each):%Y%m%dT%H%M%SZ}' for each in times)
    said = {'BEGIN': 'VEVENT', 'UID': shown.uid, 'DTSTAMP': changed, 'LAST-MODIFIED': changed,
            'SEQUENCE': str(shown.revision), 'DTSTART': start, 'DTEND': end, 'STATUS': shown.status,
            'SUMMARY': escaped(shown.summary), 'DESCRIPTION': escaped(shown.description),
            'LOCATION': escaped(shown.location), 'TRANSP': 'OPAQUE', 'CATEGORIES': 'VM',
            'END': 'VEVENT'}
    return ''.join(folded(f'{name}:{value}') for name, value in said.items() if value)


def escaped(text: str) -> str:
    """A TEXT (RFC 5545, 3.3.11), which has no control characters but tabs."""
    text = re.sub(r'([\\;,])', r'\\\1', legible(text.replace('\r\n', '\n')))
    return text.replace('\n', '\\n')


def folded(line: str) -> str:
    """A content line in pieces of at most 75 octets, of whole letters (RFC 5545, 3.1)."""
    data, pieces, begin = line.encode('utf8', 'replace'), [], 0
    while begin < len(data):
        end = begin + 75 - bool(pieces)
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(data[begin:end])
        begin = end
    return b'\r\n '.join(pieces).decode() + '\r\n'


def calendar_text(name: str, shown: Iterable[Shown]) -> str:
    """A whole feed; how often it is looked at again is the subscriber's choice."""
    head = ('BEGIN:VCALENDAR', 'VERSION:2.0', f'PRODID:-//cmres//{__version__}//EN',
            'METHOD:PUBLISH', f'X-WR-CALNAME:{escaped(name)}',
            'REFRESH-INTERVAL;VALUE=DURATION:PT15M', 'X-PUBLISHED-TTL:PT15M')
    return ''.join([*map(folded, head), *map(event_text, shown), 'END:VCALENDAR\r\n'])


# Service #####################################################################
#
# What people can ask of cmres, built in layers, each a class upon the one before it: who asks and
# what they may see; what is asked, read and resolved; limits; what is held; series; admission; the
# waiting list; and then the operations themselves. A method reads: what is asked, what the cloud
# knows of it (outside any transaction), then one transaction that admits or refuses, then the
# answer read back. What is refused is explained after it, when nobody waits.


#: What a token with a scope is good for; with several, for all of that.
SCOPES: dict[str, Callable[[Operation], bool]] = {
    'read': lambda operation: not operation.changes,
    'claim': lambda operation: operation.name == 'claim',
    'calendar': lambda operation: operation.name.startswith(('calendar_', 'import_'))}
#: What a token for one resource is good for: what looks at resources one by one.
ON_ONE_RESOURCE = frozenset(
    'add list show servers duration update extend keep skip delete accept find usage resource_list '
    'resource_show'.split())


class Actor(NamedTuple):
    """Who asks; an admin may act for everybody. A token can be good for less than its role."""
    user: str
    project: str
    role: str
    scopes: frozenset[str] = frozenset()  # of SCOPES; without any, all
    resource: int | None = None           # the only one, by its id

    def refuse_out_of_scope(self, operation: Operation) -> None:
        """Forbidden if the token of who asks is not for an operation."""
        if self.scopes and not any(SCOPES[each](operation) for each in self.scopes):
            raise Forbidden(f"this token is only for {' and '.join(sorted(self.scopes))}, not for: "
                            f'{operation.words}')
        if self.resource is not None and operation.name not in ON_ONE_RESOURCE:
            raise Forbidden(f'this token is only for one resource, not for: {operation.words}')


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
    personal: bool
    repeat: str
    tz: str
    on_conflict: str
    stretches: list   # of a series; none for a plain reservation
    each: Amount  # what one machine takes
    warnings: list
    host: str = ''               # all of it is reserved, by its name
    whole: Amount | None = None  # what it holds
    trusted: list = []           # KIND:NAME that an admin gave it

    @property
    def amount(self) -> Amount:
        return self.takes(self.vms)

    def takes(self, vms: int) -> Amount:
        """What so many machines take; of a host that is reserved by name, all of it."""
        return self.whole._replace(vms=vms) if self.whole else self.each * vms

    @property
    def held(self) -> tuple[int, int]:
        return self.start - self.lead, self.end

    def columns(self, *names) -> dict:
        return {name: json.dumps(value) if isinstance(value, (list, dict)) else value
                for name in names for value in (getattr(self, name),)}


def stored_wish(wish: Wish) -> str:
    """A wish as JSON that `restored_wish` reads."""
    return json.dumps(wish._asdict() | {'resource': wish.resource.id, 'warnings': [],
                                        'stretches': [each._asdict() for each in wish.stretches]})


def restored_wish(text: str) -> Wish:
    """The wish that was stored; its resource is as it is now."""
    values = json.loads(text)
    for name in ('each', 'whole'):
        *figures, classes = values[name] or [None]
        values[name] = Amount(*figures, tuple(map(tuple, classes))) if figures else None
    stretches = [Stretch(**each) for each in values['stretches']]
    return Wish(**values | {'resource': resource_of(values['resource'], removed=True),
                            'stretches': stretches})


def with_vms(wish: Wish, vms: int) -> Wish:
    """A wish for another number of VMs, in each stretch of a series."""
    stretches = [stretch._replace(vms=vms) for stretch in wish.stretches]
    return wish._replace(vms=vms, stretches=stretches)


class Lack(NamedTuple):
    """The figure of a resource of which a wish finds too little in its window."""
    figure: str
    need: int
    limit: int     # as always
    used: int      # at most, changes of capacity included
    changes: list  # rows of those
    less: int      # what they take away, or give where it is less than nothing

    @property
    def alone(self) -> bool:
        """Whether it would be too little also if nothing were reserved."""
        return self.need > self.limit - self.less


def changed_most(changes: list[tuple], begin: int) -> int:
    """The most that changes of capacity take away together at one time from an instant on."""
    def less_at(at: int) -> int:
        return sum(less for each, less in changes if each.start <= at < each.end)
    return max((less_at(max(each.start, begin)) for each, _ in changes), default=0)


def by_line(lines: Iterable[dict]) -> list[dict]:
    """Refused lines of a file by their numbers."""
    return sorted(lines, key=lambda each: each['line'])


class Request(NamedTuple):
    """What is asked under one label: parts, each the wishes of which the first that fits does."""
    label: str
    parts: list[list[Wish]]
    wait: bool
    priority: int
    confirm: int  # seconds

    @property
    def name(self) -> str:
        """What its parts are told to belong to; nothing, if there is only one."""
        return self.label if len(self.parts) > 1 else ''

    @property
    def last(self) -> Wish:
        return self.parts[-1][-1]


def for_each_part(method):
    """Lets an operation act on each part of a request of a label: on all of them, or on none."""
    @functools.wraps(method)
    def acting(self, *args, **kwargs):
        given = inspect.signature(method).bind(self, *args, **kwargs).arguments
        dry_run = given.get('dry_run', False)
        parts = self.look.parts_of(given['label'], given.get('project', ''))
        if not parts:
            return method(**given)
        sized = {'vms'} if any(each.host and each.flavor for each in parts) else set()
        alone = {'rename', 'holidays', 'resource', 'host', *CLOUDY, *sized} & given.keys()
        if alone:  # clouds are not asked while all others wait
            raise Invalid(f"the {min(alone)} of a request is changed part by part: "
                          f"{', '.join(each.label for each in parts[:20])}")
        given |= {'dry_run': False} if 'dry_run' in given else {}
        each_given = [given | {'label': each.label, 'project': each.project} for each in parts]

        def all_parts(now: float) -> list:
            with Attempt() as attempt:
                answers = [method(**each) for each in each_given]
                waits = ['change' in each for each in answers if isinstance(each, dict)]
                if all(waits) or not any(waits):
                    return answers
                attempt.undo()  # a part needs approval: so the change of all parts waits for it
            acting = self.acting(self.actor)
            acting.bookings.proposes_all = True
            return [method(**each | {'self': acting}) for each in each_given]
        changes = API[method.__name__].changes
        answers = self.carry_out(all_parts, dry_run) if changes else [
            method(**each) for each in each_given]
        return (sum(answers, []) if isinstance(answers[0], list)
                else {'label': given['label'], 'parts': answers})
    return acting


#: Whom Nova's scheduler lets boot on a resource: who has reserved, or others as well while it is
#: free.
MODES = ('exclusive', 'shared')
#: The lengths of a resource that count only where Nova's scheduler asks cmres.
ASKED_BY_NOVA = ('hold', 'no_show')
#: What can become of machines at the end of their window.
ENDS = ('delete', 'stop', 'shelve', 'snapshot')
#: What was announced of an occurrence: a bit each.
SOON, READY, ENDING, FOREIGN, UNUSED, SHORT, LEFT, FAILED = 1, 2, 4, 8, 16, 32, 64, 128
#: The fields that only the cloud can judge.
CLOUDY = ('flavor', 'image', 'network', 'key', 'security_groups', 'server')
#: The fields of a reservation that a machine is made of; they are fixed once it has begun.
FIXED = (*CLOUDY, 'resource', 'start', 'lead', 'user_data', 'metadata', 'host')
#: What a wish has as it is asked for.
SAME = frozenset(('label', 'vms', 'flavor', 'image', 'network', 'key', 'user_data', 'description',
                  'repeat', 'on_conflict'))
STORED = ('label', 'user', 'project', *CLOUDY, 'user_data', 'metadata', 'at_end', 'notify', 'lead',
          'description', 'personal', 'repeat', 'tz', 'on_conflict', 'host', 'trusted')
#: What a project keeps only so much of.
LONG_TEXTS = ('user_data', 'description', 'metadata')
#: What one occurrence of a series may have otherwise than the others.
OWN = frozenset(('resource', 'start', 'end', 'vms'))
#: What needs more or less capacity, or other one, when it changes.
SHAPE = OWN | {'repeat', 'until', 'count', 'skip_dates', 'holidays', 'flavor', 'image', 'host',
               'lead', 'on_conflict', 'at_end', 'calendar'}
BACK = 'put back'  # the code of a proposal to have an occurrence again that was left out
#: What makes a series.
REPEATING = frozenset(('repeat', 'until', 'count', 'skip_dates', 'holidays'))
JSON = frozenset(('security_groups', 'metadata', 'notify', 'addresses', 'hosts', 'classes', 'named',
                  'trusted'))
UNCHANGED = (*STORED, 'resource_id', 'start', 'end', 'held_from', 'held_until', *Amount._fields,
             'over')
OVER = ('ended', 'cancelled', 'failed')
PLACE = ('cell', 'cloud', 'region', 'aggregate')
HIDDEN = frozenset(('now', 'resource_id', 'held_from', 'held_until', 'over', 'due', 'reservation',
                    'user_data', 'existing', 'ever', 'runs', 'told', 'slot', 'altered', 'revision',
                    'revised', 'on_conflict', 'booked_until', 'subscription', 'repeats', 'series',
                    'waiting', 'confirm', 'pending', 'priority', 'choices', 'named', 'trusted'))
#: Of a reservation, the occurrence that is now or comes next: no other that is not over comes
#: before it.
NEXT_OF_ITS = """NOT EXISTS (SELECT 1 FROM occurrence c
                              WHERE c.reservation_id = o.reservation_id AND (c.due IS NULL) = 0
                              AND c.cancelled IS NULL AND c."end" > ?1 AND (c.start,
                                c.id) < (o.start, o.id))"""
#: Its occurrences in the order in which people mean them: the present or next, those after it, at
#: last those before.
NEXT_OF = """SELECT id FROM occurrence WHERE reservation_id = {}
               ORDER BY cancelled IS NOT NULL OR "end" <= ?1,
               iif(cancelled IS NULL AND "end" > ?1, start, -start), id LIMIT 1"""
NOT_OVER = 'o.cancelled IS NULL AND o."end" > ?1'
#: What is live, and what is over for good.
BOTH = [(half, f'o.{rows}') for half, rows in HALVES.items()]
#: What has begun and is not over for good.
BEGUN = ('live', f'o.due IS NOT NULL AND o.start <= ?1 + {LONGEST_LEAD}')
#: By which indexes the occurrences of a state are found.
WAYS = {'waiting': [('series',
                     'o.reservation_id IN (SELECT id FROM reservation WHERE waiting IS NOT NULL)')],
        'pending': [('series', 'o.reservation_id IN (SELECT id FROM reservation WHERE pending IS '
                               'NOT NULL UNION SELECT reservation_id FROM proposal)')],
        'reserved': [('live', 'o.due IS NOT NULL AND o.start >= ?1')],
        **dict.fromkeys(('starting', 'active', 'degraded', 'ending'), [BEGUN]),
        'ended': [('over', 'o.due IS NULL'), BEGUN], 'failed': [('failed', 'o.told & 128'), BEGUN],
        'cancelled': [('cancelled', 'o.cancelled IS NOT NULL'), BEGUN]}
MOST_WAYS = 200  # that are merged, each of one or two halves; SQLite takes 500
BATCH = 500      # occurrences that are looked at together
MOST_BYTES = 2**20  # of text in a page of a list, which then ends before its last line
MOST_TRIED = 200  # of those that wait, in one transaction
MOST_TRIES = 500  # of other ways to spread the parts of a request over resources than the first
#: What may be offered instead of what is refused, and the field that it changes.
OFFERS = {'next_start': 'start', 'most_vms': 'vms', 'longest': 'end'}
MOST_OFFERS = 20  # starts that are tried for one of them
PATIENCE = 60  # seconds that a start may lie in the past: slow clocks, slow networks


def told(of, outcome: str, why: str = '') -> dict:
    """What became of one occurrence of a series."""
    return {'start': instant(of.start), 'end': instant(of.end), 'vms': of.vms,
            'outcome': outcome} | ({'why': why} if why else {})


def without_secrets(found):
    """A row of the listing for readers: no user data, of web addresses only the host."""
    targets = [re.sub('(?<=://)[^/]*@|(?<=[^:/])[/?#].*', '', each) if '://' in each else each
               for each in json.loads(found.notify)]
    return found._replace(user_data='', notify=json.dumps(targets))


def public(found) -> dict:
    """A row as an answer shows it: instants as datetimes, stored JSON read, nothing internal."""
    shown = {name: read(found[place]) if read else found[place]
             for name, place, read in shown_fields(found._fields)}
    if shown.get('repeat') and (stretches := read_stretches(found.series)):
        shown['repeat'] = rule_from(stretches, found.slot)
    if not shown.get('change', True):
        del shown['change']  # nothing of it awaits approval
    return shown


def refuse_unknown_word(name: str, word: str, known: Iterable[str], *also: str) -> None:
    """Invalid if an argument is none of some words; it names them and the nearest."""
    if word not in (*known, *also):
        raise Invalid(f"{name}: '{word}' is none of {', '.join(known)}{nearest(word, known)}")


def in_several(label: str, found: Iterable) -> Conflict:
    """The refusal of a label that several projects have."""
    projects = ', '.join(sorted({each.project for each in found}))
    return Conflict(f"'{label}' is in several projects ({projects}); name one with --project")


def seconds_of(length: timedelta | None) -> int:
    return int(length.total_seconds()) if length else 0


WHOSE = ('label', 'user', 'project', 'vms', 'start', 'end')


def some_of_public(found, *names: str) -> dict:
    """Some fields of a row, as an answer shows them."""
    shown = public(found)
    return {name: shown[name] for name in names}


def in_lines(found: Iterable) -> list[dict]:
    """Rows as an answer of many shows them: descriptions are cut, long metadata is left out."""
    return [public(each._replace(
        description=each.description if len(each.description) <= 200
        else f'{each.description[:197]}...',
        metadata=each.metadata if len(each.metadata) <= 1000 else '{}')) for each in found]


@functools.lru_cache
def shown_fields(fields: tuple) -> list[tuple]:
    """Of each field that is shown: its name, its place in the row, and what reads it."""
    readers = dict.fromkeys(INSTANTS, instant) | dict.fromkeys(JSON, read_json) | {
        'personal': bool, 'change': lambda text: from_plain(read_json(text or 'null'))}
    return [(name, place, readers.get(name)) for place, name in enumerate(fields)
            if name not in HIDDEN]


def read_json(text: str):
    """What a column holds; most hold nothing."""
    return [] if text == '[]' else {} if not text or text == '{}' else json.loads(text)


def within_bytes(found: list) -> list:
    """The first rows that have no more text together than a page may have; one at least."""
    sizes = itertools.accumulate(sum(len(each) for each in line if type(each) is str)
                                 for line in found)
    return [line for number, (line, size) in enumerate(zip(found, sizes)) if size <= MOST_BYTES
            or not number]


def in_figures(amount: Amount) -> dict:
    """An amount with the names of its figures."""
    return dict(zip(FIGURES, amount)) | {
        name: each for name, each in amount.classes if name not in (OTHERS, CLOSED)}


def known_classes(before: str, given: dict | None) -> str:
    """The classes of a resource with some other figures; an unlimited one is not counted."""
    classes = json.loads(before or '{}') | (given or {})
    return (json.dumps({name: most for name, most in sorted(classes.items()) if most != UNLIMITED})
            if classes else '')


def in_brief(field: str, value):
    """A figure as a line about a difference shows it: of named hosts only the names."""
    return ', '.join(json.loads(value)) if field == 'named' and value else value


def lowered(before: Amount, after: Amount) -> bool:
    """Whether a capacity is less than another in any figure."""
    pairs = [*zip(before[:3], after[:3]),
             *((before.most(name), most) for name, most in after.classes)]
    return any(most is not None and (was is None or most < was) for was, most in pairs)


def spread(name: str, lateness: list[float]) -> dict:
    """The median, the 95th of a hundred and the worst of some seconds."""
    ordered = sorted(max(each, 0) for each in lateness)
    return {f'{name}_{word}': round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3)
            if ordered else None for word, share in (('median', 0.5), ('95', 0.95), ('worst', 1))}


class Held(Error):
    """A calendar asks for so much less than before that its owner must say that it is meant."""


#: For an event that changes no occurrence, or each by itself: their revisions are counted already.
NONE_OF_THEM = -1
#: What becomes of what is booked where there is less room than before.
THEN = ('notify', 'move', 'cancel')
ANY_APPROVAL = 'SELECT id FROM resource WHERE approval > 0 AND removed IS NULL LIMIT 1'
FROM_ALL = ('FROM occurrence o JOIN reservation r ON r.id = o.reservation_id '
            'JOIN resource s ON s.id = o.resource_id')
FROM_EXTRA = ('FROM extra_hold x WHERE EXISTS (SELECT 1 FROM reservation r WHERE r.id = '
              'x.reservation_id AND {})')
#: By whom and what counts against limits: the columns of user, project, reservation and resource.
OF_OCCURRENCE = ('o.of_user', 'o.of_project', 'o.reservation_id', 'o.resource_id')
OF_EXTRA = ('r.user', 'r.project', 'r.id', 'x.resource_id')


def hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


#: Of a token t: it is in force at an instant.
IN_FORCE = 't.revoked IS NULL AND (t.ends IS NULL OR t.ends > ?)'
TOKEN = ('SELECT t.id, t.user, t.project, t.role, t.scopes, t.resource_id, t.ends, t.revoked '
         'FROM token t')
#: Of what people have, each with a condition: it is still good for something.
STILL = {'tokens': 'revoked IS NULL', 'feeds': 'revoked IS NULL',
         'subscriptions': 'due IS NOT NULL'}


def token_of(secret: str, now: float):
    """The row of a token; Unauthorized if it is nobody's, revoked or over."""
    found = row(f'{TOKEN} WHERE t.hash = ?', hashed(secret))
    if not found or found.revoked is not None:
        raise Unauthorized('this token is not known or was revoked; an admin makes one with: token '
                           'add USER')
    if found.ends is not None and found.ends <= now:
        raise Unauthorized(f'this token has ended on {instant(found.ends):%Y-%m-%d}. Renew it with '
                           f'another of yours, or ask an admin: token renew {found.id}')
    return found


def bearer_of(found) -> Actor:
    """Who a token acts for."""
    scopes = frozenset(filter(None, found.scopes.split(',')))
    return Actor(found.user, found.project, found.role, scopes, found.resource_id)


def actor_of(secret: str, now: float | None = None) -> Actor:
    """Who has a token; Unauthorized if it is nobody's, revoked or over."""
    return bearer_of(token_of(secret, time.time() if now is None else now))


#: Why something had no room that has some when that is looked into.
A_MOMENT_AGO = 'there was no room a moment ago; try again'


class Service:
    """Who asks, when, and of which cmres.

    Args:
      clock: seconds since 1970; the one place where time comes from
      wake: called after every change, so that the life cycle looks at once
      progress: passes rows through, and may show how many
      shares: what requests may take long at the same time
    """

    def __init__(self, config: Config, clouds: Clouds, actor: Actor,
                 clock: Callable[[], float] = time.time, wake: Callable[[], None] = lambda: None,
                 progress: Callable[[list], Iterable] = iter, shares: Shares | None = None):
        self.config, self.clouds, self.actor = config, clouds, actor
        self.clock, self.wake, self.progress = clock, wake, progress
        self.shares = shares or Shares(config)
        # Called in each transaction that writes; raises to end it.
        self.fence: Callable[[], None] = lambda: None
        # Called before a change and before it is written; raises if nobody wants it any more.
        self.wanted: Callable[[], None] = lambda: None
        # The seconds since the life cycle of this process has made a pass; None: it has none.
        self.age: Callable[[], float] | None = None

    def acting(self, actor: Actor) -> Service:
        """The same service on behalf of somebody else."""
        other = type(self)(self.config, self.clouds, actor, self.clock, self.wake,
                           self.progress, self.shares)
        other.fence = self.fence
        return other

    @property
    def here(self) -> Here:
        """The zone of bare times, and the instant that it is."""
        return Here(self.config.zone, instant(int(self.clock())))

    @contextmanager
    def writing(self, dry_run: bool = False) -> Iterator[float]:
        """A transaction that yields its instant, and wakes the life cycle after it."""
        with rehearsing() if dry_run else transaction():
            self.fence()
            self.wanted()
            yield self.clock()
            self.wanted()
        if not dry_run and not rehearsal.on:
            self.wake()

    def carry_out(self, deed: Callable[[float], Any], dry_run: bool = False) -> Any:
        """Does something at an instant, all of it or nothing.

        What has no room is refused at once, and explained in a rehearsal: nobody waits for it.
        """
        if dry_run:
            with self.writing(dry_run) as now:
                return deed(now)
        for _ in range(3):
            try:
                with self.writing() as now:
                    return deed(now)
            except NoCapacity:
                if db.in_transaction():  # what this is a part of is refused as a whole
                    raise
            with self.shares.paced(), self.writing(dry_run=True) as now:
                deed(now)  # where it is not refused, somebody has given something back meanwhile
        raise NoCapacity(A_MOMENT_AGO)

    def journal(self, now: float, code: str, sentence: str, reservation: int | None = None,
                notify: Iterable[str] = (), occurrence: int | None = None) -> None:
        """Appends an event in the name of the actor; inside the transaction of what it tells."""
        journal(self.config, now, self.actor.user, code, sentence, reservation, notify, occurrence)

    def tell(self, now: float, code: str, sentence: str, found,
             occurrence: int | None = None) -> None:
        """Appends an event about a row that tells its reservation and whom to notify."""
        self.journal(now, code, sentence, found.reservation, json.loads(found.notify), occurrence)

    def resolve(self, start, end) -> tuple[int, int]:
        """The seconds of a window: a length as start counts from now, as end from the start."""
        start = self.here.now + start if isinstance(start, timedelta) else start
        try:
            end = self.end_after(start, end) if isinstance(end, timedelta) else end
        except OverflowError:
            end = LAST
        if not start < end <= LAST:
            raise Invalid(f'the end {to_plain(end)} is not after the start {to_plain(start)} and '
                          f'before the year 2200')
        return int(start.timestamp()), int(end.timestamp())

    def end_after(self, start: datetime, length: timedelta) -> datetime:
        """The instant so much later: typed days by the clocks, hours exactly."""
        zone = getattr(start, 'zone', None) or self.config.zone
        nominal = timedelta(seconds=getattr(length, 'nominal', 0))
        if not nominal:
            return start + length
        return from_wall(typed_wall(start, zone) + nominal, zone) + (length - nominal)

    def span_of(self, asked: Day, zone: ZoneInfo) -> tuple[int, int, str]:
        """The seconds that an instant or a date stands for, and how a sentence calls it."""
        if type(asked) is date:
            first = at_midnight(asked)
            begin, until = (int(from_wall(each, zone).timestamp())
                            for each in (first, first + timedelta(days=1)))
            return begin, until, f'{asked}'
        asked = self.here.now + asked if isinstance(asked, timedelta) else asked
        return int(asked.timestamp()), int(asked.timestamp()) + 1, format_time(asked, zone)

    def owner(self, asked: dict) -> tuple[str, str]:
        """Whose it will be: only an admin may reserve for others."""
        user, project = asked['user'] or self.actor.user, asked['project'] or self.actor.project
        if self.actor.role != ADMIN and project != self.actor.project:
            raise Forbidden(f"only an admin may act in another project than their own, "
                            f"'{self.actor.project}'")
        if self.actor.role != ADMIN and asked['user'] not in ('', self.actor.user):
            raise Forbidden(f"only an admin may reserve for another user than themselves, "
                            f"'{self.actor.user}'")
        return user, project


# Lookup ######################################################################
#
# What is there, as far as who asks may see it.


class Lookup:
    """Finds reservations and resources."""

    def __init__(self, service: Service):
        self.service = service

    def visible(self, project: str = '') -> list:
        """The conditions that keep an actor to what is theirs, and to a project."""
        actor = self.service.actor
        one = 'EXISTS (SELECT 1 FROM occurrence WHERE reservation_id = r.id AND resource_id = ?)'
        return [*([] if actor.role == ADMIN else [('r.project = ?', actor.project)]),
                *([] if actor.resource is None else [(one, actor.resource)]),
                *([('r.project = ?', project)] if project else [])]

    def window(self, start, end) -> list:
        """The conditions on occurrences that overlap a window, either end of which may lack."""
        first = self.service.here.now if isinstance(end, timedelta) else FIRST
        begin, until = self.service.resolve(start or first, end or LAST)
        return ([('o.end > ?', begin)] if start else []) + ([('o.start < ?', until)] if end else [])

    def labelled(self, label: str, project: str = '') -> list[int]:
        """The reservations of a label, or parts of such a request; the latest first."""
        where = self.visible(project)
        also = all_of(where)
        both = [label, *given(where)] * 2
        return [each.id for each in rows(
            f'SELECT id FROM reservation r WHERE label = ?{also} UNION '
            f"SELECT id FROM reservation r WHERE request = ? AND request <> ''{also} "
            'ORDER BY id DESC', *both)]

    def newest_deed(self, label: str, project: str = '') -> int | None:
        """The newest event of what people did to the reservations of a label; None without any."""
        found = row('SELECT max(id) AS id FROM event WHERE actor <> ? AND reservation_id IN '
                    '(SELECT value FROM json_each(?))', 'cmres',
                    json.dumps(self.labelled(label, project)[:MOST_PARTS]))
        return found.id

    def parts_of(self, label: str, project: str = '') -> list:
        """The parts of the request that a label means; none if it means a reservation.

        What is not over comes first, then what is one's own, then the latest.
        """
        where = self.visible(project)
        also, values = all_of(where), given(where)
        parts = rows('SELECT id, label, project, over, added, host, flavor FROM reservation r '
                     f"WHERE request = ? AND request <> ''{also} ORDER BY id", label, *values)
        if not parts:
            return []
        plain = rows('SELECT id, label, project, over, added FROM reservation r '
                     f'WHERE label = ?{also} ORDER BY id', label, *values)
        live = [each for each in parts + plain if each.over > self.service.clock()]
        meant = live or parts + plain
        meant = [each for each in meant if each.project == self.service.actor.project] or meant
        if len({each.project for each in meant}) > 1:
            raise in_several(label, meant)
        latest = max(meant, key=lambda each: (each.added, each.id))
        return ([each for each in meant if each in parts and each.added == latest.added]
                if latest in parts else [])

    def search(self, where: list, state: Iterable[str] = (), limit: int = -1,
               tail: str = 'ORDER BY start, id', fields: str = LISTING) -> list:
        """Rows of the listing that meet all conditions, a page of them."""
        condition = f'1{all_of(where)}'
        in_state = f"state IN ({', '.join('?' * len(state))})" if state else '1'
        found = listing(self.service.clock(), condition, (*given(where), *state), in_state,
                        f'{tail} LIMIT {limit}', fields)
        return list(map(without_secrets, found)) if self.service.actor.role == READER else found

    def page(self, ways: list, where: list, state: Iterable[str], limit: int, after: str = '',
             latest: bool = False, fields: str = LISTING) -> list:
        """The first rows of the listing in order of start, or with `latest` from the last one back.

        Args:
          ways, where: as `walk` takes them
          state: only these, which are looked at after the walk
          after: the cursor, or the id, of the line behind which it begins
        """
        found, size, beyond = [], min(limit, BATCH), '<' if latest else '>'
        place = self.place_of_cursor(after) if after else None
        while ways and len(found) < limit:
            onward = [(f'(o.start, o.id) {beyond} (?, ?)', *place)] if place else []
            some = walk(self.service.clock(), ways, [*where, *onward], size, latest)
            found += self.in_order([id for _, id in some], state, fields)
            if len(some) < size or fields is BRIEF and len(found) != len(within_bytes(found)):
                break
            place, size = some[-1], min(2 * size, BATCH)
        return (within_bytes(found) if fields is BRIEF else found)[:limit]

    def in_order(self, ids: list[int], state: Iterable[str] = (), fields: str = LISTING) -> list:
        """The listing of occurrences, if they are in some states, in the order of their ids."""
        found = self.search([self.among('o.id', ids)], state, tail='', fields=fields) if ids else ()
        lines = {each.id: each for each in found}
        return [lines[id] for id in ids if id in lines]

    def among(self, column: str, ids: list[int]) -> tuple[str, str]:
        """The condition that a column is one of some ids."""
        return f'{column} IN (SELECT value FROM json_each(?))', json.dumps(ids)

    def place_of_cursor(self, after: str) -> tuple[int, int]:
        """The start and id behind which a page begins; of an id alone, its present start."""
        start, _, id = read_argument('after', after, Cursor, self.service.here).rpartition('-')
        if start:
            return int(start), int(id)
        there = row('SELECT start, id FROM occurrence WHERE id = ?', int(id))
        return tuple(there) if there else (int(LAST.timestamp()), 0)

    def ways(self, asked: dict, state: Iterable[str],
             begin: int | None = None) -> list[tuple[str, str]]:
        """By which indexes a page is found that filters ask for, of what ends after `begin`."""
        found = self.ways_by(asked, dict.fromkeys(way for word in state for way in WAYS[word])
                             if state else BOTH)
        return found if begin is None else self.overlapping(found, begin, self.within(asked))

    def overlapping(self, ways: list, begin: int, also: str) -> list[tuple[str, str]]:
        """The ways to what ends after an instant; only what is long starts long before it."""
        day, month = begin - DAY, begin - MONTH
        return [('longest', f'o."end" - o.start > {MONTH} AND o.start < {month}{also}'),
                ('long',
                 f'o."end" - o.start > {DAY} AND o.start >= {month} AND o.start < {day}{also}'),
                *((way, f'{condition} AND o.start >= {day}') for way, condition in ways)]

    def ways_by(self, asked: dict, ways: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """The same ways, by the indexes that know whose or where as well."""
        ids, whose = (asked.get('places'),
                      'user_' if asked['user'] else 'project_' if asked['project'] else '')
        by = [(whose, self.within(asked))]
        if ids is not None and len(ids) <= MOST_WAYS:
            by = [('place_', f' AND o.resource_id = {id}') for id in ids]
        return [(f'{kind}{way}', condition + one) for way, condition in ways
                for kind, one in (by if way in HALVES else [('', self.within(asked))])]

    def within(self, asked: dict) -> str:
        """The condition on the resources that are asked for."""
        return (f" AND o.resource_id IN ({', '.join(map(str, asked['places']))})"
                if 'places' in asked else '')

    def occurrence(self, id: int):
        """The listing of one occurrence, by its id."""
        return self.search([('o.id = ?', id)], tail='')[0]

    def next_of(self, reservation: int):
        """Its present or next occurrence, else its last; None if it has none."""
        found = self.search([(f'o.id = ({NEXT_OF.format("?")})', reservation)], tail='')
        return found[0] if found else None

    def mine(self, label: str, project: str = '', live: bool = True,
             occurrence: datetime | None = None):
        """The one reservation of that label that the actor means: not over, else (unless `live`)
        the latest; of a series the present or next occurrence, or the one at an instant or date.
        """
        where = [('r.label = ?', label), *self.visible(project)]
        known = (f'SELECT r.id FROM reservation r WHERE 1{all_of(where)} '
                 'AND EXISTS (SELECT 1 FROM occurrence WHERE reservation_id = r.id)')
        found = [self.next_of(each.id)
                 for each in rows(f'{known} AND r.over > ? ORDER BY r.id', *given(where),
                                  int(self.service.clock()))]
        usable = [each for each in found if each.cancelled is None
                  and each.end > self.service.clock()]
        if not usable:
            past = row(f'{known} ORDER BY r.over DESC, r.id DESC LIMIT 1', *given(where))
            if live or not past:
                raise NotFound(f"there is no reservation "
                               f"'{label}'{' that is not over' if past else ''}")
            usable = [self.next_of(past.id)]
        usable = [each for each in usable if each.project == self.service.actor.project] or usable
        if len(usable) > 1:
            raise in_several(label, usable)
        this = isinstance(occurrence, datetime) and occurrence.timestamp() == usable[0].start
        if this or not occurrence:
            return usable[0]
        return self.occurrence_at(usable[0], occurrence, live)

    def occurrence_at(self, found, asked: Day, live: bool):
        """The occurrence that begins then, or on that date by the clocks of its series."""
        zone = read_zone(found.tz or self.service.config.timezone)
        begin, until, text = self.service.span_of(asked, zone)
        there = self.search([('r.id = ?', found.reservation), ('o.start >= ?', begin),
                             ('o.start < ?', until),
                             *([(NOT_OVER, None)] if live else [])], limit=1)
        if not there:
            raise NotFound(f"'{found.label}' has no occurrence "
                           f"{'that is not over ' if live else ''}on {text}")
        return there[0]

    def live(self, found, since: str = '') -> list:
        """The occurrences of a reservation that are not over, from a slot on."""
        if not found.repeats and found.cancelled is None and found.end > self.service.clock():
            return [found]
        return self.search([('r.id = ?', found.reservation), (NOT_OVER, None),
                            ('o.slot >= ?', since)])

    def stretches(self, reservation: int) -> list[Stretch]:
        """The stretches of a series; none of a plain reservation."""
        return read_stretches(row('SELECT series FROM reservation WHERE id = ?',
                                  reservation).series)

    def begun(self, found) -> bool:
        """Whether an occurrence has begun: with machines, from its lead on."""
        return self.service.clock() >= (found.held_from if found.runs else found.start)

    def resource_row(self, name: str):
        """The resource of a name; NotFound names the nearest."""
        found = row('SELECT * FROM resource WHERE name = ? AND removed IS NULL', name)
        if not found:
            names = [each.name for each in self.places()]
            raise NotFound(f"there is no resource '{name}'{nearest(name, names)}")
        if self.service.actor.resource not in (None, found.id):
            raise Forbidden(f"this token is only for another resource, not for '{name}'")
        return found

    def id_of(self, name: str) -> int | None:
        """The id of the resource of a name, under which things are kept for it; None of no name."""
        return self.resource_row(name).id if name else None

    def places(self, *place: str) -> list:
        """Resources by cell, cloud, region and aggregate, as far as these are given."""
        given = [(column, value) for column, value in zip(PLACE, place) if value]
        given += [('id',
                   self.service.actor.resource)] if self.service.actor.resource is not None else []
        condition = ''.join(f' AND "{column}" = ?' for column, _ in given)
        return rows(f'SELECT * FROM resource WHERE removed IS NULL{condition} ORDER BY name',
                    *(value for _, value in given))

    def resource_at(self, asked: dict):
        """The one resource that is named, or at the place that is asked for."""
        found = self.resources_at(asked)
        if len(found) > 1:
            names = ', '.join(each.name for each in found[:20])
            raise Conflict(f'{len(found)} resources are at {self.place_of(asked)}; name one of '
                           f'{names}')
        return found[0]

    def resources_at(self, asked: dict) -> list:
        """The resource that is named, or all at the place that is asked for, by name."""
        place = [asked.get(column, '') for column in PLACE]
        if asked['resource'] != ANY:
            found = self.resource_row(asked['resource'])
            if any(wanted not in ('', is_at)
                   for wanted, is_at in zip(place, (getattr(found, each) for each in PLACE))):
                raise NotFound(f"the resource '{found.name}' is not at {self.place_of(asked)}; "
                               'leave the place out, or say - for its name')
            return [found]
        found = self.places(*place)
        if not found:
            raise NotFound(f'there is no resource at {self.place_of(asked)}')
        return found

    def place_of(self, asked: dict) -> str:
        """The place that was asked for, in words."""
        return (', '.join(f'{column} {asked[column]}' for column in PLACE if asked.get(column))
                or 'any place')

    def servers_of(self, occurrence: int) -> Rows:
        """The servers of an occurrence, as answers show them."""
        return [public(each) for each in rows(
            'SELECT n, name, state, addresses, planned, begun, ready, deleted, snapshot, tries, '
            'fault, account, uid '
            "FROM server WHERE occurrence_id = ? ORDER BY n, state <> 'deleted', tries, id",
            occurrence)]

    def together(self, found) -> list:
        """A reservation and, if it is a part of a request, the other parts that are not over."""
        if not found.request:
            return [found]
        return self.search([('r.request = ?', found.request), ('r.project = ?', found.project),
                            (NOT_OVER, None), (NEXT_OF_ITS, None)], tail='ORDER BY reservation')

    def filtered(self, asked: dict) -> tuple[dict, list]:
        """The filters by whose and where: as `ways` takes them, and as conditions on o."""
        own = self.service.actor.project if self.service.actor.role != ADMIN else ''
        conditions = [('o.of_user = ?', asked['user']), ('o.of_project = ?', asked['project']),
                      ('o.of_project = ?', own)]
        placed = [(column, asked[column]) for column in PLACE if asked[column]]
        placed += [('name', asked['resource'])] if asked['resource'] else []
        placed += [('id',
                    self.service.actor.resource)] if self.service.actor.resource is not None else []
        filters = {'user': asked['user'], 'project': asked['project'] or own}
        if placed:  # also on those that were removed
            at = ' AND '.join(f'"{column}" = ?' for column, _ in placed)
            filters['places'] = [each.id for each in rows(f'SELECT id FROM resource WHERE {at}',
                                                          *given(placed))]
        return filters, [condition for condition in conditions if condition[1]]

    def kept_servers(self, label: str, project: str) -> list:
        """The servers that stay after their end, of a label or all, that the actor may see."""
        where = self.visible(project)
        where += [self.among('r.id', self.labelled(label))] if label else []
        return rows(f"""SELECT v.name, r.label, r.project, r.user, iif(v.goal = 'stop', 'stopped',
          'shelved') AS state,
                               v.addresses, o."end", v.account, v.uid, v.id, r.id AS reservation
                          FROM server v JOIN occurrence o ON o.id = v.occurrence_id
                          JOIN reservation r ON r.id = o.reservation_id
                         WHERE v.state = 'kept'
                           AND NOT v.borrowed{all_of(where)}
                         ORDER BY v.id""", *given(where))


# Wishes ######################################################################
#
# What somebody asks for, read and resolved, with what the cloud knows of it; and what to say when
# it doesn't fit: what is in the way, and what would fit instead.


class Wishes:
    """Reads what is asked: resources, clouds, repetitions."""

    def __init__(self, service: Service, look: Lookup):
        self.service, self.look = service, look

    def read_wish(self, asked: dict, old=None, changes: Iterable[str] = (*STORED, *REPEATING),
                  stretches: list[Stretch] = (), key: str = '', place=None) -> Wish:
        """Resolves what is asked, checks it and asks the cloud about it; outside any transaction.

        Args:
          old: the row of the reservation that this would change
          changes: the fields that are new in it
          stretches: those of its series, where that is what changes
          key: the slot from which on they change
          place: the row of its resource, where that is known
        """
        lead = seconds_of(asked['lead'])
        start, end = self.resolve_window(asked, old, lead)
        user, project = self.owner_of(asked, old)
        place, warnings, changes = place or self.look.resource_at(asked), [], set(changes)
        self.refuse_unbootable(asked, place)
        if 'notify' in changes:
            self.refuse_untellable(asked['notify'])
        each, made_of = self.made_of(asked | {'project': project}, old, place, changes, warnings)
        same = {name: asked[name] for name in Wish._fields if name in SAME}
        wish = Wish(
            **same, user=user, project=project, resource=place, start=start, end=end, lead=lead,
            security_groups=[*asked['security_groups']], metadata=dict(asked['metadata'] or {}),
            at_end=asked['at_end'] or ('stop' if made_of['server'] else 'delete'),
            notify=[*asked['notify']], personal=bool(asked['personal']), tz=old.tz if old else '',
            stretches=[], each=each, warnings=warnings, **made_of)
        if stretches and 'repeat' not in changes:
            stretches = self.moved_stretches(wish, asked, old, stretches, key, changes)
            stretches = self.ended_stretches(stretches, asked, changes, warnings)
            return wish._replace(stretches=stretches, repeat=stretches[-1].rule)
        again = REPEATING & {name for name in changes if asked.get(name)}
        return self.repeating(wish, asked, old, stretches, key, changes) if again else wish

    def made_of(self, asked: dict, old, place, changes: set, warnings: list) -> tuple[Amount, dict]:
        """What one machine takes; which server it is, which host is reserved, whom one trusts."""
        asks = {'resource', 'host', *CLOUDY} | ({'vms'} if asked.get('host') else set())
        if old and not asks & changes:
            each, server = Amount(1) if old.host else amount_of(old) // old.vms, old.server
            trusted = asked['trusted']
        else:
            kept = asked['trusted'] if old and old.cloud == place.cloud else []
            found = self.ask_cloud(place, asked | {'trusted': kept}, warnings)
            each, server = self.each_takes(found), found['server'].id if 'server' in found else ''
            trusted = self.trusted(asked | {'server': server}, kept, changes if old
                                   else {'resource'})
        same_host = old and old.host and not {*asks, 'vms'} & changes
        host, whole = ((old.host, amount_of(old)) if same_host
                       else self.whole_host(place, asked, each))
        return each, {'server': server, 'host': host, 'whole': whole, 'trusted': trusted}

    def owner_of(self, asked: dict, old) -> tuple[str, str]:
        """Whose a reservation will be: user and project."""
        if not old:
            return self.service.owner(asked)
        if self.service.actor.role != ADMIN and asked['user'] != old.user:
            raise Forbidden(
                f"only an admin may give a reservation of '{old.user}' to somebody else")
        return asked['user'], old.project

    def resolve_window(self, asked: dict, old, lead: int) -> tuple[int, int]:
        """Start and end in seconds; without a new end, one that is moved keeps its length."""
        length = timedelta(seconds=old.end - old.start) if old else None
        start, end = self.service.resolve(asked['start'], asked.get('end', length))
        now = self.service.clock()
        if start < now - PATIENCE and not (old and start == old.start) and not asked.get('late'):
            raise Invalid(f'the start {to_plain(instant(start))} lies in the past')
        if end <= now:
            raise Invalid(f'the end {to_plain(instant(end))} is not in the future')
        if start < lead:
            raise Invalid('the lead reaches before the year 1970')
        return start, end

    def refuse_untellable(self, targets: Iterable[str]) -> None:
        """Refuses mail addresses to which nothing would ever be sent."""
        for target in targets:
            if not self.service.config.may_tell(target):
                raise Invalid(f"notify: no mails are sent to '{target}'; here they may go to "
                              f'addresses of {self.service.config.mail_domains} only')

    def refuse_unbootable(self, asked: dict, place) -> None:
        """Refuses combinations that could never boot, end or be told of."""
        boots, has = asked['image'], asked['server']
        if boots and has:
            raise Invalid('an image or a server, not both: a machine is made anew, or it is there '
                          'already')
        if boots and not asked['flavor']:
            raise Invalid('an image needs a flavor to boot it with')
        if (boots or has) and not place.cloud:
            raise Invalid(f"the resource '{place.name}' has no cloud, so nothing can boot there; "
                          f"leave the {'image' if boots else 'server'} out")
        if has and asked['vms'] != 1:
            raise Invalid(f"vms: a server is one machine, not {asked['vms']}")
        ends = ENDS[1:3] if has else ENDS
        refuse_unknown_word('at_end', asked['at_end'], ends, '')
        for target in asked['notify']:
            if (not re.fullmatch(r'https?://\S+|[^@\s,<>]+@[^@\s,<>]+', target)
                or len(asked['notify']) > 10):
                raise Invalid(f"notify: '{target}' is no mail address and no http(s) address, or "
                              f"they are over 10")

    def ask_cloud(self, place, asked: dict, warnings: list) -> dict:
        """What the resource's cloud knows under the names that are asked for.

        If it can't be asked, that goes to `warnings`, unless only it could tell what is needed.
        """
        named = named_by(asked)
        if not named:
            return {}
        if not place.cloud:
            raise Invalid(f"the resource '{place.name}' has no cloud that knows the "
                          f"{named[0][0].replace('_', ' ')} '{named[0][1]}'; leave it out")
        project = asked.get('project', self.service.actor.project)
        account = self.service.clouds.account(place.cloud, project)
        admin = self.service.actor.role == ADMIN
        sight = self.service.clouds.sight(account, project, asked.get('trusted', ()), admin)
        try:
            cloud = self.service.clouds.open(account)
            found = self.service.shares.ask(f'the cloud {account}',
                                            lambda: cloud.check(named, sight))
            return dict(zip((kind for kind, _ in named), found))
        except CloudError as error:
            if asked.get('flavor') and (place.vcpus, place.ram) != (None, None):
                raise CloudError(f"{error}; its flavor '{asked['flavor']}' must be known to count "
                                 f"vcpus and ram on '{place.name}'") from None
            if asked.get('server'):
                raise CloudError(f"{error}; it must tell which server '{asked['server']}' "
                                 'is') from None
            warnings.append(f'not checked: {error}')
            return {}

    def trusted(self, asked: dict, kept: list, changes: set) -> list[str]:
        """The names that an admin gave a reservation, now or before, as KIND:NAME."""
        fields = {'security_group': 'security_groups'}
        return [f'{kind}:{name}' for kind, name in named_by(asked) if f'{kind}:{name}' in kept or (
                self.service.actor.role == ADMIN
                and {'resource', fields.get(kind, kind)} & changes)]

    def each_takes(self, found: dict) -> Amount:
        """What one machine takes, of what the cloud told."""
        return Amount(1, *found['flavor'].flavor) if 'flavor' in found else Amount(1)

    def whole_host(self, place, asked: dict, each: Amount) -> tuple[str, Amount | None]:
        """The host that is reserved by its name, and what it holds."""
        name = asked.get('host') or ''
        if not name:
            return '', None
        named = json.loads(place.named or '{}')
        if name not in named:
            raise NotFound(f"the resource '{place.name}' has no host named "
                           f"'{name}'{nearest(name, named)}" + (
                           '' if named else '; an admin names hosts with: resource sync --named'))
        holds = named[name]
        classes = tuple(sorted((figure, most) for figure, most in holds.items()
                               if figure not in FIGURES))
        whole = Amount(asked['vms'], holds['vcpus'], holds['ram'], classes)
        need = each * asked['vms']
        missing = tuple((each, 0) for each in need.names if each not in holds)
        if not need.within(whole._replace(classes=classes + missing)):
            raise Invalid(f"vms: {asked['vms']} machines of {asked['flavor']} are more than the "
                          f"host '{name}' holds: "
                          f"{', '.join(f'{most} {figure}' for figure, most in holds.items())}")
        return name, whole + Amount(classes=((HOST + name, 1),))  # the host itself is there once

    def unaltered(self, old) -> dict:
        """What `add` would have to be asked to get the same reservation."""
        kept = {name: getattr(old, name) for name in (*STORED, 'resource', 'vms')}
        return kept | {name: json.loads(kept[name]) for name in kept if name in JSON} | {
                       'lead': timedelta(seconds=old.lead), 'start': instant(old.start)}

    def carried_on(self, old) -> Wish:
        """What was wished of a series, as the store has it; nobody is there to be refused."""
        clash = old.on_conflict if old.on_conflict.startswith('shift') else 'skip'
        kept = {name: self.unaltered(old)[name] for name in STORED} | {'lead': old.lead}
        return Wish(resource=None, start=old.start, end=old.end, vms=old.vms,
                    stretches=self.look.stretches(old.reservation) if old.repeats else [],
                    each=amount_of(old) // old.vms, warnings=[],
                    whole=amount_of(old) if old.host else None, **kept | {'on_conflict': clash})

    def repeating(self, wish: Wish, asked: dict, old, stretches: list[Stretch], key: str,
                  changes: Iterable[str]) -> Wish:
        """A wish with the series that it asks for, which begins with the first slot of its rule."""
        zone = read_zone(asked.get('tz') or wish.tz or self.service.config.timezone)
        wish = wish._replace(on_conflict=read_argument('on_conflict', asked['on_conflict'], Clash,
                                                       self.service.here))
        begins = asked['start'] if isinstance(asked['start'], datetime) else instant(wish.start)
        first, ends = typed_wall(begins, zone), asked.get('end', instant(wish.end))
        length, exact = typed_length(ends, instant(wish.start), first, zone)
        if stretches and 'end' not in changes:
            length, exact = self.stretch_of(old, stretches)[1:]
        if stretches and 'start' not in changes:
            first = self.planned(old, stretches)[1]
        skips = self.read_skips(asked, zone, wish.start, wish.warnings)
        if not asked['repeat']:
            raise Invalid(f"{min(name for name in REPEATING if asked.get(name))} is for a series; "
                          f"say --repeat as well")
        rule = local_rule(self.ended_rule(asked, zone), zone)
        stretch = Stretch(first.isoformat(), length, zone.key, wish.vms, wish.resource.id, rule,
                          skips=skips, exact=exact)
        slot = next(slots(stretch, self.service.clock(), LAST.timestamp()), None)
        if not slot:
            raise Invalid(f'the repetition {rule} has no occurrence from {first:%Y-%m-%d %H:%M} on')
        stretches = [*stretches_before(stretches, key), stretch]
        return wish._replace(start=slot.start, end=slot.end, repeat=rule, tz=zone.key,
                             stretches=stretches)

    def moved_stretches(self, wish: Wish, asked: dict, old, stretches: list[Stretch], key: str,
                        changes: Iterable[str]) -> list[Stretch]:
        """A series whose occurrences from one on are where a certain one is wished to be."""
        if not OWN & set(changes):
            return stretches
        zone, planned = self.planned(old, stretches)
        begins = asked['start'] if isinstance(asked['start'], datetime) else instant(wish.start)
        start = typed_wall(begins, zone)
        # where a gap has put it, by what was planned
        first = start if 'start' in changes or old.altered else planned
        ends = asked['end'] if 'end' in changes else instant(wish.end)
        length, exact = typed_length(ends, instant(wish.start), first, zone)
        new = {'length': length, 'exact': exact} if 'end' in changes else {}
        new |= {'vms': wish.vms} if 'vms' in changes else {}
        new |= {'resource': wish.resource.id} if 'resource' in changes else {}
        shift = int((start - planned).total_seconds()) if 'start' in changes else 0
        return cut_stretches(stretches, key, shift=shift, **new)

    def planned(self, old, stretches: list[Stretch]) -> tuple[ZoneInfo, datetime]:
        """The zone of a series, and for when by its clocks an occurrence was planned."""
        stretch, _, _ = self.stretch_of(old, stretches)
        slot = datetime.fromisoformat(old.slot or stretch.start)
        return read_zone(stretch.zone), slot + timedelta(seconds=stretch.shift)

    def stretch_of(self, old, stretches: list[Stretch]) -> tuple[Stretch, int, int]:
        """The stretch that an occurrence belongs to, and its length by the clocks and exactly."""
        stretch = next(each for each in reversed(stretches) if each.since <= old.slot)
        return stretch, stretch.length, stretch.exact

    def ended_stretches(self, stretches: list[Stretch], asked: dict, changes: Iterable[str],
                        warnings: list) -> list[Stretch]:
        """A series with further days left out, or with another end."""
        if not REPEATING & set(changes):
            return stretches
        zone = read_zone(stretches[-1].zone)
        skips = self.read_skips(asked, zone, int(self.service.clock()), warnings)
        ends = {'until', 'count'} & set(changes)
        return [stretch._replace(skips=(*stretch.skips, *skips), rule=local_rule(self.ended_rule(
            asked | {'repeat': endless(stretch.rule)}, zone), zone) if ends and stretch.rule
                                 else stretch.rule) for stretch in stretches]

    def ended_rule(self, asked: dict, zone: ZoneInfo) -> str:
        """The rule that is asked for with its end; a date is meant to its last second."""
        # Python may call without `bind`
        rule = read_argument('repeat', asked['repeat'], Repeat, self.service.here)
        until, count = asked.get('until'), asked.get('count')
        if (until is not None) + (count is not None) + bool(re.search('UNTIL|COUNT', rule)) > 1:
            raise Invalid('a series ends once: by --until, by --count or in its rule')
        if until is not None:
            until = self.service.here.now + until if isinstance(until, timedelta) else until
            last = (datetime.combine(until, datetime.max.time()) if type(until) is date
                    else to_wall(until, zone))
            return f'{rule};UNTIL={last:%Y%m%dT%H%M%S}'
        return f'{rule};COUNT={count}' if count else rule

    def read_skips(self, asked: dict, zone: ZoneInfo, start: int,
                   warnings: list) -> tuple[str, ...]:
        """Days, or wall times, without an occurrence; outside any transaction."""
        skips = []
        for text in asked.get('skip_dates') or ():
            try:
                moment = datetime.fromisoformat(text.replace('/', '-'))
            except ValueError:
                raise Invalid(f"skip_dates: '{text}' is no date; write 2026-12-24") from None
            wall = to_wall(moment, zone) if moment.tzinfo else moment
            skips.append(wall.date().isoformat() if re.fullmatch('[0-9/-]+', text)
                         else wall.isoformat())
        if source := asked.get('holidays'):
            skips += self.holidays(source, zone, instant(start), warnings)
        return tuple(skips)

    def holidays(self, source: str, zone: ZoneInfo, begin: datetime, warnings: list) -> list[str]:
        """The days of a calendar's all-day events for ten years; what can't be read is told."""
        entries = read_calendar(self.fetched(source), 'the calendar of holidays')
        begin, until = begin - timedelta(days=1), begin + timedelta(days=3653)
        found, refused = days_of(entries, zone, begin, until)
        if refused and not found:
            raise BadCalendar(f'the calendar of holidays: {refused[0]}')
        warnings += [f'no holiday: {why}' for why in refused[:10]]
        return found

    def fetched(self, source: str) -> str:
        """The text of a calendar, or of the one at an address; never of a file of this machine."""
        if not re.match('https?://', source):
            return source
        try:
            status, _, body = self.service.shares.ask(f'the host {host_of(source)}',
                                                      lambda: fetch(self.service.config, source,
                                                                    {}))
        except (Undelivered, CloudError) as error:
            raise Unavailable(f'the calendar could not be fetched: {error}') from None
        if status != 200:
            raise Unavailable(f'the calendar could not be fetched: the answer was {status}')
        return body.decode('utf8', 'surrogateescape')

    def as_now(self, wish: Wish) -> Wish:
        """A wish with the row of its resource as it is in this transaction."""
        before = wish.resource
        place = resource_of(before.id)
        if not place or place.cloud != before.cloud or wish.host and place.named != before.named:
            raise Conflict(f"the resource '{before.name}' was changed or removed meanwhile; "
                           'ask again')
        return wish._replace(resource=place)


class Reasons:
    """Why something has no room, and what is in its way."""

    def __init__(self, service: Service, look: Lookup):
        self.service, self.look = service, look

    def to_come(self, wish: Wish) -> tuple[int, int]:
        """The window that a wish holds, as far as it is not past."""
        return max(wish.held[0], int(self.service.clock())), wish.held[1]

    def lack(self, wish: Wish) -> Lack | None:
        """What a wish finds too little of in its window; None if its resource has enough."""
        begin, until = self.to_come(wish)
        amount, limits = wish.amount, capacity(wish.resource)
        held = peak(wish.resource.id, begin, until, amount.names)
        used, most = dict(held.classes) | in_figures(held), in_figures(limits)
        most |= {name: limits.most(name) for name in amount.names}
        lacking = {name: need for name, need in in_figures(amount).items()
                   if most[name] is not None and used.get(name, 0) + need > most[name]}
        if CLOSED in used:
            lacking, most = {CLOSED: 1}, {CLOSED: 0}
        if not lacking:
            return None
        # First a host, then what there is never enough of.
        figure = min(lacking, key=lambda each: (not each.startswith(HOST),
                                                lacking[each] <= most[each]))
        changes = self.changes_of(wish.resource.id, begin, until, figure)
        return Lack(figure, lacking[figure], most[figure], used.get(figure, 0),
                    [each for each, _ in changes], changed_most(changes, begin))

    def changes_of(self, resource: int, begin: int, until: int, figure: str) -> list[tuple]:
        """The changes of capacity in a window, each with how much of a figure it takes away."""
        found = rows('SELECT * FROM capacity WHERE resource_id = ? AND removed IS NULL '
                     'AND start < ? AND "end" > ? ORDER BY start', resource, until, begin)
        held = ((each, amount_of(each, 'held_')) for each in found)
        takes = ((each, dict(amount.classes) | in_figures(amount)) for each, amount in held)
        return [(each, figures[figure]) for each, figures in takes if figures.get(figure)]

    def why_not(self, wish: Wish, lack: Lack | None) -> str:
        """The sentence that says which figure is lacking, when, and how much of it there is."""
        name = wish.resource.name
        if not lack:  # somebody has just given something back
            return A_MOMENT_AGO
        start, end = (format_time(instant(at), self.service.config.zone) for at in wish.held)
        unit = 'MiB of ram' if lack.figure == 'ram' else lack.figure
        if lack.changes and lack.alone:
            return self.why_less(name, lack, unit)
        if lack.figure.startswith(HOST):
            return f"the host '{wish.host}' is reserved already between {start} and {end}"
        asked = f'{lack.need} are asked for'
        if lack.alone:
            return f"'{name}' holds at most {lack.limit - lack.less} {unit}; {asked}"
        free = max(lack.limit - lack.used, 0)
        return f"'{name}' has {free} of {lack.limit} {unit} free from {start} to {end}; {asked}"

    def why_less(self, name: str, lack: Lack, unit: str) -> str:
        """The sentence for what does not fit since there is less for a while, or nothing."""
        begin, until = lack.changes[0].start, max(each.end for each in lack.changes)
        start, end = (format_time(instant(at), self.service.config.zone) for at in (begin, until))
        reasons = ', '.join(dict.fromkeys(each.reason for each in lack.changes))
        if lack.figure == CLOSED:
            return f"'{name}' is closed from {start} to {end}: {reasons}"
        left = max(lack.limit - lack.less, 0)
        return (f"'{name}' has only {left} of {lack.limit} {unit} from {start} to {end} "
                f'({reasons}); {lack.need} are asked for')

    def in_the_way(self, wish: Wish, lack: Lack | None, own: int) -> dict:
        """At most ten of what takes what is lacking; of others' only how much and when."""
        changes = [{'reason': each.reason, 'start': instant(each.start), 'end': instant(each.end)}
                   for each in (lack.changes if lack else ())]
        if not lack or lack.alone:  # it would not fit either if nobody had reserved anything
            return {'in_the_way': changes[:10]}
        begin, until = self.to_come(wish)
        where, values = (f'{lack.figure} > 0', ()) if lack.figure in FIGURES else (
            'classes LIKE ?', (f'%"{lack.figure}"%',))
        there = (f' AND o.due IS NOT NULL AND o.resource_id = {wish.resource.id} '
                 f'AND o.start < {until} + {LONGEST_LEAD}')
        near = ids_by(self.look.overlapping([('place_live', f'1{there}')], begin, there))
        found = rows(f"""
            SELECT r.label, r.user, r.project, h.vms, h.start, h.until FROM (
              SELECT reservation_id, vms, start, "end" AS until FROM occurrence
                WHERE id IN ({near}) AND resource_id = ?
                 AND held_from < ? AND held_until > ? AND held_until > held_from AND {where}
                   UNION ALL
              SELECT reservation_id, vms, held_from, held_until FROM extra_hold
                WHERE resource_id = ?
                 AND held_from < ? AND held_until > ? AND {where}) h CROSS
                   JOIN reservation r ON r.id = h.reservation_id
             WHERE r.id <> ? ORDER BY h.start DESC, r.id DESC LIMIT 10""",
            *(wish.resource.id, until, begin, *values) * 2, own)
        return {'in_the_way': changes + [self.seen_in_the_way(each) for each in found[::-1]]}

    def seen_in_the_way(self, found) -> dict:
        """What the actor may see of what holds something; stopped VMs that stay have no end."""
        whose = {'label': found.label, 'user': found.user, 'project': found.project}
        mine = self.service.actor.role == ADMIN or found.project == self.service.actor.project
        end = None if found.until >= LAST.timestamp() else instant(found.until)
        when = {'vms': found.vms, 'start': instant(found.start), 'end': end}
        return whose | when if mine else when

    def fewer(self, wish: Wish, lack: Lack | None, old) -> Iterator[tuple[int, Wish]]:
        """As many VMs as there is room for in that window."""
        begin, until = self.to_come(wish)
        most = capacity(wish.resource)
        used = peak(wish.resource.id, begin, until, wish.amount.names)
        left = {name: most.most(name) - held for name, held in used.classes
                if most.most(name) is not None} | {
                name: limit - held for name, limit, held in zip(FIGURES, most, used)
                if limit is not None}
        rooms = [left[name] // need for name, need in in_figures(wish.each).items() if need
                 and name in left]
        # Who asks for more than there ever is must ask for something else, however much is free.
        offered = rooms and lack and not wish.whole and not (lack.alone and lack.used > lack.less)
        if offered and (old.vms if old else 0) < min(rooms) < wish.vms:
            yield min(rooms), with_vms(wish, min(rooms))


# Limits ######################################################################
#
# How much a user or a project may have; looked at in the transaction that admits.


class Others:
    """The other occurrences of a series while it is changed: what counts against limits.

    Here each is what it keeps, then what it gets; the store has the old of them.
    """

    def __init__(self, reservation: int, now: float):
        self.reservation, self.now = reservation, int(now)
        # by slot: with the start, from which on hours count
        self.holds: dict[str, list[tuple[Hold, int]]] = {}
        # the slots that hold something on a day since 1970
        self.days: dict[int, set[str]] = defaultdict(set)
        self.seconds: dict[int | None, int] = defaultdict(int)  # of vcpus; None: of all resources

    def put(self, slot: str, holds: Iterable[Hold], start: int) -> None:
        """What an occurrence holds from now on."""
        self.count(slot, -1)
        self.holds[slot] = [(each, start) for each in holds]
        self.count(slot, 1)

    def count(self, slot: str, sign: int) -> None:
        for each, start in self.holds.get(slot, ()):
            seconds = sign * each.amount.vcpus * max(each.until - max(each.begin, start, self.now),
                                                     0)
            for resource in (None, each.resource):
                self.seconds[resource] += seconds
            for day in range(each.begin // 86400, each.until // 86400 + 1):
                (self.days[day].add if sign > 0 else self.days[day].discard)(slot)

    def holding(self, resource: int | None, begin: int, until: int) -> list[tuple[int, int, int]]:
        """The holds on a resource, or on any, that overlap a window: when, and of how many VMs."""
        slots = set().union(*(self.days.get(day, ())
                              for day in range(begin // 86400, until // 86400 + 1)))
        return [(each.begin, each.until, each.amount.vms) for slot in slots
                for each, _ in self.holds[slot]
                if each.begin < until and each.until > begin and resource in (None, each.resource)]


LIMITS = '''SELECT l.*, coalesce(s.name, '') AS resource
              FROM limits l LEFT JOIN resource s ON s.id = l.resource_id'''


class Limits:
    """What users and projects may have at most."""

    def __init__(self, service: Service):
        self.service = service

    def limits_for(self, wish: Wish) -> list:
        """The limits of a wish: of its user, its project, or else of every project."""
        theirs = once('SELECT * FROM limits WHERE user IN (?, ?) AND project IN (?, ?)', '',
                      wish.user, '', wish.project) if standing().limits else ()
        found = [each for each in theirs if each.resource_id in (None, wish.resource.id)]
        own = {each.resource_id for each in found if each.project and not each.user}
        return [each for each in found if each.user or each.project or each.resource_id not in own]

    def refuse_beyond(self, wish: Wish, now: float, old=None, others: Others | None = None,
                      own: int = 0) -> None:
        """Refuses what goes beyond a limit; inside the transaction that would admit it.

        Args:
          old: its occurrence as it was, which doesn't count; what it had already, it may keep
          others: the other occurrences of its series as they will be
          own: its reservation
        """
        for limit in self.limits_for(wish):
            near = limit.exempt and int(now) - PATIENCE <= wish.start < now + limit.exempt and (
                wish.end - wish.start <= self.service.config.exempt_longest)
            if not near or old and old.start <= now:
                for name, value, fits_it, passes in self.beyond(limit, wish, now, old, others, own):
                    if value is not None and not fits_it:
                        whose = limit.user or limit.project or 'every project'
                        raise Conflict(f"the limit {name.replace('_', ' ')} of {whose} is {passes}",
                                       limit=name, value=value, passes=passes)

    def beyond(self, limit, wish: Wish, now: float, old, others: Others | None,
               own: int) -> Iterator[tuple]:
        """Of each figure of a limit: name, value, whether a wish is within, what would be."""
        length, before = wish.end - wish.start, old.end - old.start if old else 0
        stays = old and (not limit.resource_id or old.resource_id == wish.resource.id)
        less = stays and old.start <= wish.start and wish.end <= old.end and wish.vms <= old.vms
        yield 'longest', limit.longest, length <= max(limit.longest or 0,
                                                      before), format_duration(limit.longest or 0)
        moved = not old or wish.start != old.start
        yield 'ahead', limit.ahead, not moved or wish.start <= now + (limit.ahead or 0), (
            f'{format_duration(limit.ahead or 0)}: until {instant(int(now) + (limit.ahead or 0))}')
        nearest = now + (limit.least_notice or 0)
        yield 'least_notice', limit.least_notice, not moved or wish.start >= nearest, (
            f'{format_duration(limit.least_notice or 0)}: from {instant(int(nearest))}')
        if limit.most_vms is not None:
            most = self.most_at_once(limit, wish, old, others, own)
            yield 'most_vms', limit.most_vms, less or most + wish.vms <= limit.most_vms, (
                f'{limit.most_vms}, of which {max(limit.most_vms - most, 0)} are free at that time')
        if limit.vcpu_hours is not None:
            used = self.future_hours(limit, wish, now, old, others)
            need = wish.amount.vcpus * (wish.end - max(wish.start, int(now))) / 3600
            yield 'vcpu_hours', limit.vcpu_hours, less or used + need <= limit.vcpu_hours, (
                f'{limit.vcpu_hours}, of which {max(limit.vcpu_hours - used, 0):.0f} are left')

    def counted(self, limit, wish: Wish, others: Others | None,
                of: tuple[str, ...]) -> tuple[str, list]:
        """What counts against a limit: columns of user, project, reservation and resource."""
        user, project, reservation, resource = of
        wanted = {user: limit.user and wish.user,
                  project: limit.project or not limit.user and wish.project,
                  resource: limit.resource_id}
        conditions = {f'{column} = ?': value for column, value in wanted.items() if value}
        conditions |= {f'{reservation} <> ?': others.reservation if others else 0}
        return ' AND '.join(conditions), [*conditions.values()]

    def most_at_once(self, limit, wish: Wish, old, others: Others | None, own: int) -> int:
        """How many machines the limited have at most at the same time in the window of a wish."""
        begin, until = wish.held
        where, values = self.counted(limit, wish, others, OF_OCCURRENCE)
        found = run('SELECT held_from, held_until, vms FROM occurrence o '
                    f'WHERE {where} AND o.due IS NOT NULL AND o.start < ? + {LONGEST_LEAD} '
                    'AND held_until > held_from AND o.id <> ? AND held_from < ? AND held_until > ?',
                    *values, until, old.id if old else 0, until, begin).fetchall()
        where, values = self.counted(limit, wish, others, OF_EXTRA)
        found += run(f'SELECT x.held_from, x.held_until, x.vms {FROM_EXTRA.format(where)} '
                     'AND held_from < ? AND held_until > ? '
                     'AND (proposal_id IS NOT NULL OR reservation_id <> ?)', *values, until, begin,
                     own if old and not others else 0).fetchall()
        found += others.holding(limit.resource_id, begin, until) if others else []
        changes = [change for first, last, vms in found
                   for change in ((max(first, begin), 1, vms), (last, 0, -vms))]
        return max(itertools.accumulate((vms for _, _, vms in sorted(changes)), initial=0))

    def future_hours(self, limit, wish: Wish, now: float, old, others: Others | None) -> float:
        """The vcpu-hours that the limited have reserved from now on."""
        where, values = self.counted(limit, wish, others, OF_OCCURRENCE)
        seconds = others.seconds[limit.resource_id] if others else 0
        seconds += run(
            'SELECT coalesce(sum(vcpus * ("end" - max(start, ?))), 0) FROM occurrence o WHERE '
            f'{where} AND o.due IS NOT NULL AND held_until > held_from AND o.id <> ? AND "end" > ?',
            int(now), *values, old.id if old else 0, int(now)).fetchone()[0]
        where, values = self.counted(limit, wish, others, OF_EXTRA)
        extra = run(f'SELECT vcpus * (held_until - max(held_from, ?)) {FROM_EXTRA.format(where)} '
                    'AND proposal_id IS NOT NULL AND held_until > ?', int(now), *values, int(now))
        return (seconds + sum(each for each, in extra)) / 3600

    def refuse_many_waiting(self, wish: Wish) -> None:
        """Refuses to let a user or a project wait with more requests than a limit says."""
        for limit in self.limits_for(wish):
            if limit.waiting is None:
                continue
            who, name = ('user', wish.user) if limit.user else ('project', wish.project)
            waits, = run("SELECT count(DISTINCT iif(request <> '', project || ' ' || request, id)) "
                         f'FROM reservation WHERE waiting IS NOT NULL AND {who} = ? AND over > ?',
                         name, int(self.service.clock())).fetchone()
            if waits >= limit.waiting:
                raise Conflict(f'the limit waiting of {name} is {limit.waiting}, and {waits} wait '
                               'already', limit='waiting', value=limit.waiting, passes=0)


# Policy ######################################################################
#
# Whatever is promised changes by a Change, and each Change goes through `Bookings.commit`: it asks
# these rules, whoever asks for the change. A rule is told what is and what is to be.


class Change(NamedTuple):
    """One occurrence as it is, and as it is to be."""
    before: Any        # its row; None: it is new
    after: Wish | None  # what it is to be, by itself; None: it is given up
    key: str           # its slot; '' if it is the only one
    had: list[Hold]    # nothing, if it is new or comes back
    wants: list[Hold]  # nothing, if it waits
    gives: list[Hold]  # of what it had
    growth: list[Hold]  # of what it wants
    columns: dict      # what is written of it that follows from nothing else

    @property
    def kept(self) -> list[Hold]:
        """What it has and goes on to have."""
        return beyond(self.had, self.gives)

    @property
    def known(self):
        """Its row, if what it has already is no news for limits."""
        there = self.before and self.before.cancelled is None
        holds = there and self.before.held_until > self.before.held_from
        return self.before if holds or there and not self.wants else None


def change_to(before, after: Wish, now: float, key: str = '', waits: bool = False,
              **columns) -> Change:
    """The change of an occurrence to a wish; one that has begun keeps the lead that it had."""
    had = [hold_of(before)] if before and before.cancelled is None else []
    begin, _ = after.held
    if before and before.start == after.start and before.start <= now:
        begin = min(before.held_from, after.start)
    wants = [] if waits else [Hold(after.resource.id, begin, after.end, after.amount)]
    return Change(before, after, key, had, wants, beyond(had, wants), beyond(wants, had),
                  {'held_from': begin, 'held_until': begin if waits else after.end} | columns)


def given_up(before, now: float, **columns) -> Change:
    """The change of an occurrence that ends now, or never begins."""
    until = min(max(int(now), before.held_from), before.held_until)
    had = hold_of(before)
    gives = [had._replace(begin=until)] if until < had.until else []
    return Change(before, None, before.slot, [had], [], gives, [],
                  {'cancelled': int(now), 'held_until': until, 'due': now} | columns)


def is_same(change: Change) -> bool:
    """Whether an occurrence is to be what it is."""
    is_at, to_be = change.before, change.after
    if not is_at or not to_be or is_at.cancelled is not None:
        return False
    return (is_at.start, is_at.end, is_at.resource_id, amount_of(is_at)) == (
        to_be.start, to_be.end, to_be.resource.id, to_be.amount) and all(
        getattr(is_at, name) == value for name, value in change.columns.items())


class View(NamedTuple):
    """What rules look at beside a change."""
    now: float
    own: int  # its reservation; 0: a new one
    others: Others | None  # the other occurrences that change with it
    line: tuple  # its place among those that wait, if it waits


A_SERIES_WAITS = 'a series can not wait; --on-conflict skip takes the occurrences that fit'


class Deal(NamedTuple):
    """What becomes of a reservation: all of it, or nothing."""
    code: str              # why: the code of its event
    wish: Wish
    changes: list[Change]
    old: Any = None        # the listing of the occurrence that it is told for; None: it is new
    columns: dict = {}     # what is otherwise of its row
    stretches: list | None = None  # of its series then, [] of a plain one; None: it ends as before
    horizon: int = 0       # until when that series is in rows
    clash: str = ''        # what becomes of an occurrence without room; '': all is refused
    same: list[dict] = []  # what is told of occurrences that don't change
    patches: dict = {}     # of occurrences, by id, what nobody is told of: slots
    asked: Iterable[str] = ()  # the names of what is to be otherwise
    named: bool = False    # that occurrence was named, so that it changes also if it was alone
    alone: bool = False    # no other occurrence changes


class Made(NamedTuple):
    """What a deal has made true."""
    reservation: int
    done: list[dict]  # of a series, what became of each occurrence, by start


class Policy:
    """The rules: each refuses with a Conflict, or lets pass."""

    def __init__(self, service: Service, look: Lookup, limits: Limits, reasons: Reasons):
        self.service, self.look, self.limits, self.reasons = service, look, limits, reasons

    def refuse_deal(self, deal: Deal, now: float) -> None:
        """Raises what the first rule says that is against a deal, whatever it wants to hold."""
        for rule in self.refuse_fixed, self.refuse_waiting_series, self.refuse_taken_label:
            rule(deal, now)

    def hold_if_allowed(self, change: Change, view: View) -> None:
        """Raises what the first rule says that is against a change; else it holds what it wants."""
        for rule in (self.refuse_shared_server, self.refuse_unlimited, self.refuse_never_fitting,
                     self.refuse_overtaking, self.refuse_overbooking):
            rule(change, view)
        for each in change.growth:
            hold(*each)

    def refuse_shared_server(self, change: Change, view: View) -> None:
        """A machine that somebody has can be started and stopped by one reservation at a time."""
        wish = change.after
        if not wish.server or not change.wants:
            return
        other = row('SELECT r.label, r.user, r.project, o.vms, o.start, o."end" AS until '
                    'FROM occurrence o JOIN reservation r ON r.id = o.reservation_id '
                    "WHERE r.server = ? AND r.server <> '' AND o.due IS NOT NULL "
                    'AND o.held_from < ? AND o.held_until > ? AND r.id <> ?',
                    wish.server, wish.held[1], wish.held[0], view.own)
        if other:
            # The sentence goes to the event log as well, which the project of the wish reads.
            whose = f" by '{other.label}'" if other.project == wish.project else ''
            raise Conflict(f'the server {wish.server} is reserved{whose} in that time already',
                           in_the_way=[self.reasons.seen_in_the_way(other)])

    def refuse_unlimited(self, change: Change, view: View) -> None:
        """Refuses what goes beyond a limit."""
        self.limits.refuse_beyond(change.after, view.now, change.known, view.others, view.own)

    def refuse_never_fitting(self, change: Change, view: View) -> None:
        """Refuses to wait for what there will never be."""
        if not change.wants and not change.after.amount.within(self.most_ever(change.after)):
            raise NoCapacity('')

    def refuse_overtaking(self, change: Change, view: View) -> None:
        """Refuses to take what is kept for one that has waited for long."""
        for each in change.growth:
            first = self.first_in_line(each, view)
            if first:
                since = instant(first.waiting)
                name = resource_of(each.resource, removed=True).name
                raise NoCapacity(f"'{name}' is kept for a request of {first.vms} vms that waits "
                                 f'since {since}', waits_since=since)

    def refuse_overbooking(self, change: Change, view: View) -> None:
        """THE RULE: at no instant from now on is more held than there is."""
        refuse_without_room(change.growth, view.now)

    def first_in_line(self, wanted: Hold, view: View):
        """Who has waited for longer than `patience` for room there, and is not behind in line."""
        before = '''AND NOT w.limited AND w.due > 0 AND r.id <> ?
                    AND (-r.priority, r.waiting, o.id) < (?, ?, ?)''' if view.line else ''
        return standing().waits and row(f"""
                       SELECT o.vms, r.waiting FROM wait w INDEXED BY wait_since
                         CROSS JOIN reservation r ON r.id = w.reservation_id
                         JOIN occurrence o ON o.reservation_id = r.id
                        WHERE w.resource_id = ? AND w.until > ? AND w.held_from < ?
                          AND w.since <= ? AND w.until > ? AND o.cancelled IS NULL {before}
                        ORDER BY r.priority DESC, r.waiting, o.id LIMIT 1""",
                   wanted.resource, wanted.begin, wanted.until,
                   view.now - self.service.config.patience, int(view.now), *view.line)

    def most_ever(self, wish: Wish) -> Amount:
        """What a resource holds at most in the window of a wish, loans included."""
        begin, until = wish.held
        most, lent = capacity(wish.resource), NOTHING
        for each in rows('SELECT held_vms, held_vcpus, held_ram, held_classes FROM capacity '
                         'WHERE resource_id = ? AND removed IS NULL AND start < ? AND "end" > ?',
                         wish.resource.id, until, begin):
            lent += NOTHING.beyond(amount_of(each, 'held_'))
        return Amount(*(None if each is None else each + more
                        for each, more in zip(most[:3], lent)), added(most, lent, 1))

    def refuse_taken_label(self, deal: Deal, now: float) -> None:
        """Refuses a new label that something of the project has that is not over."""
        wish, old = deal.wish, deal.old
        if not old or deal.asked and (wish.label, wish.project) != (old.label, old.project):
            self.refuse_taken(wish.project, wish.label, now)

    def refuse_taken(self, project: str, label: str, now: float) -> None:
        read_argument('label', label, Label, self.service.here)  # Python may call without `bind`
        if taken_label(project, label, now):
            raise Conflict(f"the label '{label}' is taken in project '{project}' by a reservation "
                           'that is not over; choose another')

    def refuse_waiting_series(self, deal: Deal, now: float) -> None:
        if deal.wish.stretches and (deal.columns.get('waiting') or deal.old and deal.asked
                                    and deal.old.waiting is not None):
            raise Invalid(A_SERIES_WAITS)

    def refuse_taken_resource(self, name: str) -> None:
        """Refuses the name of a resource that there is."""
        read_argument('name', name, Label, self.service.here)
        if row('SELECT id FROM resource WHERE name = ? AND removed IS NULL', name):
            raise Conflict(f"there is a resource '{name}' already; choose another name or update "
                           'that one')

    def refuse_many_texts(self, wish: Wish, old=None) -> None:
        """Refuses more long texts than a project may keep; after they were written."""
        now, before = (sum(map(len, texts)) for texts in (
            wish.columns(*LONG_TEXTS).values(),
            [getattr(old, name) for name in LONG_TEXTS] if old else ()))
        kept = (row('SELECT size FROM texts WHERE project = ?', wish.project)
                if now > max(before, 1000) else None)
        most = self.service.config.project_texts
        if kept and kept.size > most * 2**20:
            raise TooLarge(f"the project '{wish.project}' keeps at most {most} MiB of user data, "
                           'descriptions and metadata; shorten some, or let an admin raise the '
                           'setting project_texts')

    def refuse_fixed(self, deal: Deal, now: float) -> None:
        """A reservation that has begun keeps what its machines are made of."""
        old, wish, asked = deal.old, deal.wish, deal.asked
        if 'calendar' in asked:  # which says all of it; what has begun keeps start and place
            asked = {*FIXED} - {'start', 'resource', 'lead'}
        names = [name for name in FIXED if name in asked] if old else ()
        new = {name: getattr(wish, name) for name in names}
        new |= {'resource': wish.resource.name} if 'resource' in names else {}
        other = [name for name in names if new[name] != (
            json.loads(getattr(old, name)) if name in JSON else getattr(old, name))]
        if other and self.look.begun(old):
            raise Conflict(f"'{old.label}' has begun, so its {other[0].replace('_', ' ')} can't "
                           'change; its end, vms, user, description and label can')


def taken_label(project: str, label: str, now: float) -> bool:
    """Whether a reservation or a request that is not over has a label."""
    return bool(row('SELECT id FROM reservation WHERE project = ? AND label = ? AND over > ? '
                    "UNION ALL SELECT id FROM reservation WHERE request = ? AND request <> '' "
                    'AND project = ? AND over > ? LIMIT 1',
                    project, label, int(now), label, project, int(now)))


# Bookings ####################################################################
#
# `commit` makes promises otherwise, and nothing else does: of a reservation all changes or none.
# First each change gives back what it gives up; then, in order, each takes what it wants more, if
# every rule lets it; then rows are written. What grows and needs an approval is undone, and waits
# as a proposal, which holds the growth.


#: The deals that need no approval, whoever asks: what gives back, was agreed, or is operators'.
AGREED = ('released', 'carried on', 'left out', 'admitted', 'maintenance', 'granted')


class Bookings:
    """Makes promises; inside a transaction."""

    # also what needs no approval by itself: it belongs to a request of which a part does
    proposes_all = False

    def __init__(self, service: Service, policy: Policy, reasons: Reasons):
        self.service, self.policy, self.reasons = service, policy, reasons

    def commit(self, deal: Deal, now: float) -> Made | None:
        """Makes a deal true, or none of it; None: it is proposed, since it needs an approval."""
        old = deal.old
        # Another change settles those that were proposed before.
        if SHAPE & set(deal.asked) and (old.change is not None or old.repeats and not deal.alone):
            self.drop_proposals(old.reservation, old.id if deal.alone else None)
        if not self.may_need_approval(deal):
            return self.make_true(deal, now)
        before = self.holds(old.reservation)
        with Attempt() as attempt:
            made = self.make_true(deal, now)
            growth = [each for each in beyond(self.holds(old.reservation), before)
                      if each.until > now]
            span = max((resource_of(each.resource, removed=True).approval for each in growth),
                       default=0)
            if not growth or not span and not self.proposes_all:
                return made
            if old.pending is not None:
                self.await_approval(old.reservation, int(now) + span, deal.wish, now)
                return made
            attempt.undo()
        last = old.end if deal.alone or not old.repeats else int(LAST.timestamp())
        until = min(int(now) + span, last) if span else last
        self.propose(deal, until, growth, now)
        return None

    def may_need_approval(self, deal: Deal) -> bool:
        """Whether somebody asks for it who is no admin, where an admin must approve."""
        old, wish = deal.old, deal.wish
        if not old or deal.code in AGREED or old.waiting is not None:
            return False
        if self.service.actor.role == ADMIN:
            return False
        if self.proposes_all or old.repeats or wish.stretches:
            return self.proposes_all or bool(once(ANY_APPROVAL))
        places = old.resource_id, wish.resource.id
        return any(resource_of(id, removed=True).approval for id in places)

    def make_true(self, deal: Deal, now: float) -> Made:
        """Decides and writes a deal that needs no approval."""
        old, wish = deal.old, deal.wish
        self.policy.refuse_deal(deal, now)
        decided = self.decide_all(deal, now)
        reservation = old.reservation if old else self.write_new(deal, decided, now)
        self.write_occurrences(reservation, deal.patches, decided, now)
        if old:
            self.write_old(deal, now)
        if wish.resource and (not old or deal.asked):
            self.policy.refuse_many_texts(wish, old)
        if deal.columns.get('waiting') or old and old.waiting is not None:
            self.stand_in_line(reservation)
        if wish.image and (old or wish.at_end == 'stop') or old and old.image:
            gone = [each.had[0] for each in deal.changes if not each.after]
            self.keep_stopped(reservation, now, gone)
        done = [*deal.same, *(line for line, _, _ in decided)] if deal.clash else []
        return Made(reservation, sorted(done, key=lambda line: line['start']))

    def decide_all(self, deal: Deal, now: float) -> list[tuple]:
        """Holds what a deal's changes want: of each what became of it, its row, its columns."""
        old, wish, decided, refused = deal.old, deal.wish, [], []
        own = old.reservation if old else 0
        others = (self.others_of(own, {each.before.id for each in deal.changes if each.before}, now)
                  if len(deal.changes) > 1 else None)
        line = (own, -old.priority, old.waiting, old.id) if old and old.waiting is not None else ()
        view = View(now, own, others, line)
        for each in deal.changes:
            give(each.gives)
            if others and each.after:
                others.put(each.key, each.kept, each.after.start)
        if others:
            read_windows((piece for each in deal.changes for piece in each.growth), now)
        for each in self.service.progress(deal.changes) if others else deal.changes:
            try:
                decided.append(self.decide(each, view, deal.clash))
            except NoCapacity as error:
                if not deal.clash:
                    raise
                refused.append((each.after, error))
        if refused:
            raise self.refusal_of(refused, sum(bool(each.after) for each in deal.changes), wish)
        return decided

    def decide(self, change: Change, view: View, clash: str) -> tuple[dict, Any, dict]:
        """Holds what one change wants, or what `clash` says is done instead."""
        old, one = change.before, change.after
        if not one:
            return told(old, 'cancelled'), old, change.columns
        if view.others:
            view.others.put(change.key, (), one.start)
        try:
            self.policy.hold_if_allowed(change, view)
        except Conflict as error:
            if not clash:
                raise
            return self.decide_otherwise(change, view, clash, error)
        if view.others:
            view.others.put(change.key, change.wants, one.start)
        return (told(one, 'changed' if change.had else 'booked'), old,
                self.columns_of(change, view.now))

    def decide_otherwise(self, change: Change, view: View, clash: str,
                         error: Conflict) -> tuple[dict, Any, dict]:
        """What becomes of an occurrence of a series that has no room, or is beyond a limit."""
        old, one = change.before, change.after
        refused = clash == 'refuse'
        if refused and 'limit' in error.details:
            raise error
        lack = self.reasons.lack(one)
        why = str(error) or self.reasons.why_not(one, lack)
        if refused:
            refusal = NoCapacity(why)
            if rehearsal.on:
                refusal = NoCapacity(why, **self.reasons.in_the_way(one, lack, view.own))
                refusal.most_vms = max((vms for vms, _ in self.reasons.fewer(one, lack, old)),
                                       default=0)
            raise refusal
        give(change.kept)
        if clash.startswith('shift') and isinstance(error, NoCapacity) and (
                other := self.shifted(change, view, clash)):
            return told(other.after, 'shifted', why), old, self.columns_of(other, view.now)
        if self.stays(change, view):
            return told(old, 'unchanged', why), old, {'altered': True}
        out = change_to(None, one, view.now, waits=True, **unheld(view.now, old))
        return told(one, 'left out', why), old, self.columns_of(
            out._replace(before=old, key=change.key), view.now)

    def shifted(self, change: Change, view: View, clash: str) -> Change | None:
        """An occurrence moved by as little as possible to where every rule lets it be."""
        one = change.after
        most = int(parse_duration(clash.partition('=')[2]).total_seconds())
        (begin, end), now = one.held, int(view.now)
        need = end - begin
        free = free_windows(one.resource, one.amount, max(begin - most, now), begin + most + need)
        nearest_ones = [min(max(begin, int(first)), int(last) - need)
                        for first, last in free if last - first >= need]
        for at in sorted(nearest_ones, key=lambda at: (abs(at - begin), at)):
            there = one._replace(start=at + one.lead, end=at + need)
            other = change_to(None, there, now, altered=True, cancelled=None)
            with suppress(Conflict):
                self.policy.hold_if_allowed(other, view)
                if view.others:
                    view.others.put(change.key, other.wants, there.start)
                return other._replace(before=change.before, key=change.key)
        return None

    def stays(self, change: Change, view: View) -> bool:
        """Holds again what an occurrence had, which has begun or still fits; whether it does."""
        if not change.had:
            return False
        begun = change.before.held_from <= view.now
        try:
            take(change.had, view.now, given=change.had if begun else change.kept)
        except NoCapacity:
            return False
        if view.others:
            view.others.put(change.key, change.had, change.before.start)
        return True

    def refusal_of(self, refused: list[tuple[Wish, NoCapacity]], number: int,
                   wish: Wish) -> NoCapacity:
        """The refusal of a series some occurrences of which have no room."""
        one, error = refused[0]
        first = format_time(instant(one.start), read_zone(wish.stretches[0].zone))
        text = (f'{len(refused)} of {number} occurrences do not fit, so nothing was changed; '
                f'the first from {first}: {error}')
        if len(refused) < number:
            text += '. Take the others with --on-conflict skip'
        refusal = NoCapacity(
            text if number > 1 else str(error),
            conflicts=[{'start': instant(each.start), 'end': instant(each.end), 'vms': each.vms,
                        'why': str(why)} for each, why in refused[:1000]], **error.details)
        refusal.most_vms = min(getattr(why, 'most_vms', 0) for _, why in refused)
        return refusal

    def others_of(self, reservation: int, changing: set[int], now: float) -> Others:
        """What counts against limits of the occurrences that don't change now."""
        others = Others(reservation, now)
        there = standing().limits and reservation and rows(
            'SELECT * FROM occurrence WHERE reservation_id = ? AND due IS NOT NULL '
            'AND held_until > held_from', reservation)
        for each in there or ():
            if each.id not in changing:
                others.put(each.slot, [hold_of(each)], each.start)
        return others

    def columns_of(self, change: Change, now: float) -> dict:
        """What is written of an occurrence that is to be."""
        old, one, begin = change.before, change.after, change.columns['held_from']
        if not old:
            first = dict(of_project=one.project, of_user=one.user, slot=change.key, altered=False,
                         revision=0, revised=int(now), told=0,
                         due=min(begin, one.start - self.service.config.notice))
        else:
            again = 0 if one.start != old.start else ~ENDING if one.end != old.end else ~0
            first = {'due': min(now, begin), 'told': old.told & again, 'cancelled': None}
        return first | dict(resource=one.resource.id, start=one.start, end=one.end,
                            **stored(one.amount)) | change.columns

    def write_new(self, deal: Deal, decided: list[tuple], now: float) -> int:
        """Writes the row of a new reservation; its id."""
        wish, stretches = deal.wish, deal.stretches or []
        live = [columns['end'] for _, _, columns in decided if not columns.get('cancelled')]
        if not live:
            first = decided[0][0]['why']
            raise NoCapacity(f"none of {len(decided)} occurrences fits; of the first: {first}",
                             conflicts=[line for line, _, _ in decided[:1000]])
        on = goes_on(stretches, deal.horizon)
        end = int(LAST.timestamp()) if on else max(int(now), *live)
        return insert(Reservation, **wish.columns(*STORED) | {
            'origin': '', 'added': int(now), 'changed': int(now), 'priority': 0, 'confirm': 0,
            'request': '', 'choices': '', 'booked_until': deal.horizon if on else None,
            'series': stored_stretches(stretches) if stretches else '', 'over': end} | deal.columns)

    def write_old(self, deal: Deal, now: float) -> None:
        """Writes what is otherwise of a reservation, and until when its label is taken."""
        columns, id = deal.columns | {'changed': int(now)}, deal.old.reservation
        if deal.code == 'released' and (deal.old.waiting, deal.old.pending) != (None, None):
            run('UPDATE reservation SET waiting = NULL, pending = NULL WHERE id = ?1 AND '
                'NOT EXISTS (SELECT 1 FROM occurrence o WHERE o.reservation_id = ?1 AND '
                'o.cancelled IS NULL)', id)  # there is nothing left to wait for
        if deal.stretches is None:
            change(Reservation, id, **columns)
            return
        on = goes_on(deal.stretches, deal.horizon)
        columns['booked_until'] = deal.horizon if on else None
        over = """, over = coalesce(?, max(?, coalesce((SELECT min(max("end"), 1 << 62)
                     FROM occurrence WHERE reservation_id = ? AND cancelled IS NULL), 0)))"""
        run(change_text(Reservation, tuple(columns), over), *columns.values(),
            int(LAST.timestamp()) if on else None, int(now), id, id)

    def write_occurrences(self, reservation: int, patches: dict, decided: list[tuple],
                          now: float) -> None:
        """Writes what became of occurrences; what they hold is held already."""
        insert_many(Occurrence, [{'reservation': reservation} | columns
                                 for _, old, columns in decided if not old])
        written = {old.id: columns for _, old, columns in decided if old}
        for id in patches.keys() - written.keys():
            change(Occurrence, id, **patches[id])
        for id, columns in written.items():
            change_occurrence(id, now, **patches.get(id, {}) | columns)

    def holds(self, reservation: int) -> list[Hold]:
        """What a reservation holds: its occurrences, and its VMs that stay after them."""
        own = 'resource_id, held_from, held_until, vms, vcpus, ram, classes'
        return [hold_of(each) for each in rows(
            f'SELECT {own} FROM occurrence WHERE reservation_id = ?1 AND due IS NOT NULL '
            f'AND held_until > held_from UNION ALL SELECT {own} FROM extra_hold '
            'WHERE reservation_id = ?1 AND proposal_id IS NULL', reservation)]

    def hold_beside(self, reservation: int, proposal: int | None, holds: Iterable[Hold]) -> None:
        """Writes down what is held beside the occurrences; it is held already."""
        for each in holds:
            insert(ExtraHold, reservation=reservation, proposal=proposal, resource=each.resource,
                   held_from=each.begin, held_until=each.until, **stored(each.amount))

    def drop_proposals(self, reservation: int, occurrence: int | None = None) -> int:
        """Forgets what is proposed of a reservation or one occurrence; how many there were."""
        found = rows('SELECT id FROM proposal WHERE reservation_id = ? AND (NOT alone OR '
                     'occurrence = coalesce(?, occurrence))', reservation, occurrence)
        for each in found:
            give(map(hold_of, rows('SELECT * FROM extra_hold WHERE proposal_id = ?', each.id)))
            run('DELETE FROM extra_hold WHERE proposal_id = ?', each.id)
            run('DELETE FROM proposal WHERE id = ?', each.id)
        return len(found)

    def keep_stopped(self, reservation: int, now: float, given: list[Hold] = ()) -> None:
        """Holds what VMs take that stay, stopped: until the next occurrence, or for good.

        Args:
          given: what the same change has given back
        """
        had = [hold_of(each) for each in rows(
            'SELECT * FROM extra_hold WHERE reservation_id = ? AND proposal_id IS NULL',
            reservation)]
        wants = sorted(self.stopped_holds(reservation, now))
        if wants == sorted(had):
            return
        give(beyond(had, wants))
        try:
            take(beyond(wants, had), now, given)
        except NoCapacity:
            raise NoCapacity('stopped VMs keep their capacity after the end until they are '
                             'deleted, and others have reserved it by then; end with --at-end '
                             'delete or shelve') from None
        run('DELETE FROM extra_hold WHERE reservation_id = ? AND proposal_id IS NULL', reservation)
        self.hold_beside(reservation, None, wants)

    def count_stopped(self, reservation: int, now: float) -> None:
        """Holds what stopped VMs take, also where others have it: the VMs are there."""
        self.keep_stopped(reservation, now, [*self.stopped_holds(reservation, now)])

    def stopped_holds(self, reservation: int, now: float) -> Iterator[Hold]:
        """What the VMs hold that are stopped or will be, from the end of each occurrence on."""
        found = rows("""
            SELECT o.*, r.host, (SELECT count(*) FROM server v WHERE v.occurrence_id = o.id
                     AND v.goal = 'stop' AND v.state = 'kept' AND NOT v.borrowed) AS stopped
              FROM occurrence o JOIN reservation r ON r.id = o.reservation_id
             WHERE r.id = ? AND r.image <> '' AND r.waiting IS NULL
               AND (o.cancelled IS NULL OR o.due IS NULL)
               AND (o.due IS NOT NULL AND r.at_end = 'stop' OR o.id IN (
                     SELECT occurrence_id FROM server WHERE state = 'kept' AND goal = 'stop'
                       AND NOT borrowed))
             ORDER BY o.start""", reservation)
        for each, after in zip(found, [*found[1:], None]):
            there = each.vms if each.due is not None else each.stopped
            starts_them = after and after.held_from > now and after.resource_id == each.resource_id
            again = min(there, after.vms) if starts_them else 0
            one = amount_of(each) if each.host else amount_of(each) // each.vms
            for number, until in ((again, after.held_from if again else 0),
                                  (there - again, int(LAST.timestamp()))):
                if number and each.held_until < until:
                    amount = one if each.host else one * number
                    yield Hold(each.resource_id, each.held_until, until, amount)

    def erase(self, reservation: int) -> None:
        """Erases a reservation as if it had never been."""
        self.drop_proposals(reservation)
        for table in ('occurrence', 'extra_hold'):
            held = map(hold_of, rows(f'SELECT * FROM {table} WHERE reservation_id = ?',
                                     reservation))
            give(each for each in held if each.begin < each.until)
        run('DELETE FROM outbox WHERE event_id IN '
            '(SELECT id FROM event WHERE reservation_id = ?)', reservation)
        for table in ('extra_hold', 'wait', 'event', 'occurrence'):
            run(f'DELETE FROM {table} WHERE reservation_id = ?', reservation)
        run('DELETE FROM reservation WHERE id = ?', reservation)

    def hold_capacity(self, resource: int, begin: int, until: int, more: Amount) -> None:
        """Holds so much more for a change of capacity, which asks no rule."""
        hold(resource, begin, until, more)

    @contextmanager
    def as_if_without(self, old) -> Iterator[None]:
        """Looks at what there would be if an occurrence held nothing."""
        with undone():
            if old:
                give([hold_of(old)])
            yield

    def stand_in_line(self, reservation: int) -> None:
        """Notes where one that waits could be, as it is now; one that waits no more makes way."""
        for each in rows('SELECT resource_id, held_from, until FROM wait WHERE reservation_id = ?',
                         reservation):
            call_waiting(*each)
        run('DELETE FROM wait WHERE reservation_id = ?', reservation)
        remembered.change()
        found = row('SELECT r.choices, r.waiting, o.resource_id, o.held_from, o."end" '
                    'FROM reservation r JOIN occurrence o ON o.reservation_id = r.id '
                    'WHERE r.id = ? AND r.waiting IS NOT NULL AND o.cancelled IS NULL', reservation)
        for resource in dict.fromkeys(each[0] for each in json.loads(found.choices or '[]')
                                      or [[found.resource_id]]) if found else ():
            insert(Wait, reservation=reservation, resource=resource, held_from=found.held_from,
                   until=found.end, since=found.waiting, limited=False, due=0)

    def await_approval(self, reservation: int, until: int, wish: Wish, now: float) -> None:
        """Lets a reservation wait for an admin until an instant."""
        change(Reservation, reservation, pending=until, confirm=0)
        said = self.service.config.told_time(until, wish.tz)
        self.service.journal(now, 'pending', f'an admin must approve it until {said}', reservation,
                             wish.notify)

    def propose(self, deal: Deal, until: int, growth: list[Hold], now: float) -> None:
        """Writes down a change that waits for approval, and holds what it takes more."""
        # it fits: the deed had that, and at each instant what was or what will be is held
        take(growth, now)
        old, wish, asked = deal.old, deal.wish, sorted(deal.asked)
        shown = self.shown_change(old, wish, asked) | {'asked_by': self.service.actor.user,
                                                       'decide_before': instant(until)}
        id = insert(Proposal, reservation=old.reservation, occurrence=old.id, alone=deal.alone,
                    named=deal.named, user=self.service.actor.user, code=deal.code,
                    asked=json.dumps(asked), wish=stored_wish(wish), until=until,
                    shown=json.dumps(to_plain(shown)))
        self.hold_beside(old.reservation, id, growth)
        said = self.service.config.told_time(until, wish.tz)
        self.service.journal(now, 'pending',
                             f"an admin must approve the change of {', '.join(asked)} "
                             f'until {said}; what was approved goes on as it is', old.reservation,
                             wish.notify)

    def shown_change(self, old, wish: Wish, asked: list[str]) -> dict:
        """What would be otherwise, as answers show it."""
        new = wish.columns(*STORED) | {'resource': wish.resource.name, 'start': instant(wish.start),
                                       'end': instant(wish.end), 'vms': wish.vms}
        before = public(old)
        return {name: value for name, value in new.items()
                if name in asked or name in OWN and value != before[name]}


def unheld(now: float, old=None) -> dict:
    """What is otherwise of an occurrence that its series goes without: it holds nothing."""
    return {'cancelled': int(now), 'due': now if old else None}


# Series ######################################################################
#
# What makes the occurrences of a series what its stretches want, as far as the horizon.


class Series:
    """The deals of series."""

    def __init__(self, service: Service, look: Lookup, wishes: Wishes, bookings: Bookings):
        self.service, self.look, self.wishes, self.bookings = service, look, wishes, bookings

    def spelled(self, deal: Deal, there: list, now: float, gentle: bool = False,
                again: bool = True) -> Deal:
        """A deal with all changes that make of a series what its stretches want.

        What has begun keeps its start; what was changed, left out or skipped alone stays as it is.

        Args:
          gentle: what runs goes on, also if it isn't wanted any more
          again: what had no room, or was not wanted for a while, is tried again
        """
        wish, stretches = deal.wish, deal.wish.stretches
        there = [each._replace(**deal.patches.get(each.id, {})) for each in there]
        skipped = {old.slot for old in there if old.cancelled is not None and old.altered}
        horizon = self.horizon(stretches, now, skipped)
        earliest = self.earliest(there, stretches, now)
        wanted = {slot.key: slot for slot in all_slots(stretches, earliest, horizon)}
        gone, same, todo = [], [], []
        for old in there:
            slot = wanted.pop(old.slot, None)
            if old.end <= now:
                continue
            slot = self.settled(old, slot, wish, now, gentle, again)
            if slot is None and old.cancelled is None:
                gone.append(given_up(old, now))
            elif slot and self.differs(old, slot, wish):
                todo.append((slot, old))
            elif slot and old.cancelled is None:
                same.append(told(old, 'unchanged'))
        todo += [(slot, None) for slot in wanted.values() if slot.end > now]
        todo.sort(key=lambda each: each[0].start)
        self.refuse_impossible(wish, todo, now)
        return deal._replace(
            changes=gone + [self.change_at(wish, slot, old, now) for slot, old in todo],
            same=same, stretches=stretches, horizon=horizon, clash=wish.on_conflict or 'refuse')

    def change_at(self, wish: Wish, slot: Slot, old, now: float) -> Change:
        """The change that makes an occurrence be at a slot."""
        one = wish._replace(resource=resource_of(slot.resource), start=slot.start, end=slot.end,
                            vms=slot.vms, stretches=[])
        return change_to(old, one, now, slot.key)

    def refuse_impossible(self, wish: Wish, todo: list[tuple], now: float) -> None:
        """Refuses what can't be of a series, however much room there is."""
        if wish.server and any(one.end > after.start
                               for (one, _), (after, _) in zip(todo, todo[1:])):
            raise Conflict(f'the occurrences overlap, and the server {wish.server} is one machine')
        for slot, old in todo:
            if resource_of(slot.resource) is None:
                raise Conflict('the resource of the series is not there any more; move it to '
                               'another with --resource')
            if old and slot.start != old.start and slot.start < now - PATIENCE:
                raise Conflict(f'the occurrence of {instant(old.start)} would begin in the past, '
                               f'{instant(slot.start)}')

    def there(self, reservation: int) -> list:
        """The rows of all occurrences of a reservation."""
        return rows('SELECT * FROM occurrence WHERE reservation_id = ? ORDER BY start', reservation)

    def earliest(self, there: list, stretches: list[Stretch], now: float) -> float:
        """From when on slots must be known: one that was moved was planned for earlier."""
        moved = [from_wall(datetime.fromisoformat(old.slot),
                           read_zone(stretches[0].zone)).timestamp()
                 for old in there if old.slot and old.end > now and stretches]
        return min([now, *moved]) - max((abs(stretch.shift) for stretch in stretches),
                                        default=0) - 86400

    def horizon(self, stretches: list[Stretch], now: float, skipped: Iterable[str] = ()) -> int:
        """Until when a series is in rows: at least its next occurrence is."""
        following = [next((slot.start + 1 for slot in slots(stretch, now, LAST.timestamp())
                           if slot.key not in skipped), 0) for stretch in stretches]
        return max(int(now) + self.service.config.horizon * 86400,
                   min(filter(None, following), default=0))

    def settled(self, old, slot: Slot | None, wish: Wish, now: float, gentle: bool,
                again: bool) -> Slot | None:
        """What an occurrence is to become, of what its series wants; None: cancelled."""
        here = Slot(old.slot, old.start, old.end, old.vms, old.resource_id)
        if old.cancelled is not None:
            same = slot and not again and (slot.start, slot.end) == (old.start, old.end)
            return None if old.altered or same else slot
        if slot and old.altered:
            return here
        if now >= (old.held_from if wish.image or wish.server else old.start):
            begun = slot and slot._replace(start=old.start, resource=old.resource_id, vms=old.vms)
            return begun or (here if gentle else None)
        return slot

    def differs(self, old, slot: Slot, wish: Wish) -> bool:
        """Whether an occurrence is otherwise than its series wants it."""
        is_at = old.start, old.end, old.resource_id, *amount_of(old)
        wanted = slot.start, slot.end, slot.resource, *wish.takes(slot.vms)
        return old.cancelled is not None or is_at != wanted or (
            slot.start - wish.lead != old.held_from and not old.altered)

    def carry_on(self, head, now: float) -> list[dict]:
        """Carries a series on as far as the horizon is now, by the zone table as it is now."""
        deal = Deal('carried on', self.wishes.carried_on(head), [], head)
        there = self.there(head.reservation)
        return self.bookings.commit(self.spelled(deal, there, now, gentle=True, again=False),
                                    now).done

    def refresh(self, reservation: int, now: float) -> None:
        """Carries a series on, and tells what has no room; inside a transaction."""
        head = self.look.next_of(reservation)
        for one in self.carry_on(head, now):
            if one.get('why') and one['outcome'] in ('left out', 'shifted'):
                self.service.journal(now, 'refused',
                                     f"{format_time(one['start'], read_zone(head.tz or 'UTC'))} is "
                                     f"{one['outcome']}: {one['why']}", reservation,
                                     json.loads(head.notify))

    def kept_identities(self, there: list, wish: Wish, now: float) -> dict[int, dict]:
        """New slots for occurrences whose slots are gone, by id; first of the same day.

        So an event that is moved is one event in feeds, and no program shows it twice.
        """
        slots = all_slots(wish.stretches, self.earliest(there, wish.stretches, now),
                          self.horizon(wish.stretches, now))
        wanted, taken = {slot.key for slot in slots}, {old.slot for old in there}
        lost = {old.slot: old.id for old in there if old.cancelled is None and old.held_from > now
                and not old.altered and old.slot not in wanted}
        new = {slot.key: slot.key[:10] for slot in slots
               if slot.key not in taken and slot.end > now}
        days = {day: key for key, day in new.items()}
        pairs = {slot: days.pop(slot[:10]) for slot in lost if slot[:10] in days}
        given = {*pairs.values()}
        rest = [key for key in new if key not in given]
        pairs |= zip((slot for slot in lost if slot not in pairs), rest)
        return {lost[slot]: {'slot': key} for slot, key in pairs.items()}


# Admission ###################################################################
#
# What makes, changes and cancels whole reservations; of a request all of its parts, or none.


class Spent(NoCapacity):
    """No way was found for all parts of a request in as many tries as are made."""


def choose(parts: list[list], book: Callable[[Any, list], Any], kind: Callable[[list], Any]):
    """Takes of each part the first choice that lets the others be taken as well; what that gave.

    Parts of one kind are taken one after the other, each from the choice of the one before it on:
    what had no room for one has none for the next, and to exchange two of them changes nothing.
    A NoCapacity (Spent: too many tries) says as `placed` how many had room together.

    Args:
      book: takes a choice, beside what the parts before it gave
      kind: tells parts apart whose choices differ in what they take
    """
    numbers: dict = {}
    kinds = [numbers.setdefault(kind(part), len(numbers)) for part in parts]
    order = sorted(range(len(parts)), key=kinds.__getitem__)
    without_search = len(parts) + sum(len(parts[kinds.index(n)]) for n in numbers.values())
    tries = iter(range(MOST_TRIES + without_search))
    found = chosen([(kinds[n], parts[n]) for n in order], book, tries, [])
    return [each for _, each in sorted(zip(order, found), key=lambda pair: pair[0])]


def chosen(parts: list[tuple], book: Callable, tries: Iterator, taken: list, first: int = 0):
    """What `choose` finds behind what is taken, for the next part from its `first` choice on."""
    (kind, choices), refusals = parts[len(taken)], []
    for n in range(first, len(choices)):
        if next(tries, None) is None:
            raise Spent(f'no way to reserve all {len(parts)} parts together was found in '
                        f'{MOST_TRIES} tries; name a resource for each part, or ask for fewer '
                        'parts')
        try:
            with Attempt():
                got = [*taken, book(choices[n], taken)]
                if len(got) == len(parts):
                    return got
                return chosen(parts, book, tries, got, n if parts[len(got)][0] == kind else 0)
        except Spent:
            raise
        except Conflict as refusal:
            refusal.placed = getattr(refusal, 'placed', len(taken))
            refusals.append(refusal)
            if refusal.placed > len(taken) and parts[refusal.placed][0] == kind:
                break  # one of its kind has room nowhere behind this
    if not refusals:  # those of its kind have used up all choices
        refusals = [NoCapacity('')]
        refusals[0].placed = len(taken)
    raise max(reversed(refusals), key=lambda each: (isinstance(each, NoCapacity), each.placed))


def kind_of(part: list[Wish]) -> tuple:
    """What tells a part from another: what it takes, and when, on each of its resources."""
    return tuple((wish.resource.id, wish.held, wish.amount, wish.server) for wish in part)


class Admission:
    """Reservations as a whole, and requests of several; inside a transaction."""

    def __init__(self, look: Lookup, wishes: Wishes, series: Series, reasons: Reasons):
        self.look, self.wishes, self.series, self.reasons = look, wishes, series, reasons
        self.service, self.bookings = series.service, series.bookings
        self.policy = self.bookings.policy

    def book(self, wish: Wish, now: float, **columns) -> tuple[int, list]:
        """Makes a reservation: its id, and of a series what became of each occurrence."""
        wish = self.wishes.as_now(wish)
        place = wish.resource
        pending = int(
            now) + place.approval if place.approval and self.service.actor.role != ADMIN else None
        deal = Deal('added', wish, [], columns=columns | {'pending': pending})
        reservation, done = self.bookings.commit(
            self.series.spelled(deal, [], now) if wish.stretches
            else deal._replace(changes=[change_to(None, wish, now)]), now)
        done = done if wish.stretches else []
        what = self.told_series(wish, done) if wish.stretches else f'{wish.vms} vms on {place.name}'
        self.service.journal(now, 'added', what, reservation, wish.notify, NONE_OF_THEM)
        if pending and not wish.stretches:
            until = self.service.config.told_time(pending, wish.tz)
            self.service.journal(now, 'pending', f'an admin must approve it until {until}',
                                 reservation, wish.notify)
        return reservation, done

    def told_series(self, wish: Wish, done: list[dict]) -> str:
        """What was booked of a series, for the journal."""
        left_out = sum(each['outcome'] == 'left out' for each in done)
        return (f"{wish.vms} vms on {wish.resource.name}, {wish.repeat or 'once'}: "
                f"{len(done) - left_out} occurrences{f', {left_out} left out' if left_out else ''}")

    def edit(self, old, wish: Wish, asked: Iterable[str], now: float, code: str = 'updated',
             named: bool = False, alone: bool = False) -> Deal:
        """The deal that makes of a reservation what is asked; `code` can be BACK or 'calendar'."""
        deal = Deal(code, wish, [], old, asked=asked, named=named, alone=alone)
        if code == BACK:
            return self.edit_back(deal, now)
        if wish.stretches:
            return self.edit_series(deal, now)
        wish = self.wishes.as_now(wish)
        waits = old.waiting is not None
        stretches = self.look.stretches(old.reservation) if old.repeats else []
        columns = {} if old.repeats else wish.columns(*STORED)
        if old.choices and {'resource', 'host', 'flavor'} & set(asked):
            columns['choices'] = ''  # it waits for this one alone
        wants = Hold(wish.resource.id, *wish.held, wish.amount)
        if waits and beyond([wants], [hold_of(old)._replace(until=old.end)]):
            columns['waiting'] = int(now)  # it goes to the end of the line
        return deal._replace(
            wish=wish, columns=columns, stretches=stretches,
            changes=[change_to(old, wish, now, old.slot, waits, altered=bool(old.repeats))],
            horizon=self.series.horizon(stretches, now) if stretches else 0)

    def is_as_before(self, deal: Deal) -> bool:
        """Whether a deal changes nothing, wherever the stretches of its series are cut."""
        def uncut(stretches: list[Stretch]) -> set[str]:
            return {json.dumps(each._replace(since='', until='')) for each in stretches}
        for name, value in deal.columns.items():
            if name == 'series':
                had = self.look.stretches(deal.old.reservation)
                if uncut(read_stretches(value)) != uncut(had):
                    return False
            elif value != getattr(deal.old, name):
                return False
        return not deal.patches and all(map(is_same, deal.changes))

    def edit_series(self, deal: Deal, now: float) -> Deal:
        """The deal that changes a series, or makes one of a plain reservation."""
        old, wish, patches = deal.old, deal.wish, {}
        there = self.series.there(old.reservation)
        if deal.code == 'calendar':
            patches = self.series.kept_identities(there, wish, now)
        elif not old.repeats:  # what it has becomes the first of the series
            first = next(slots(wish.stretches[-1], now, LAST.timestamp()))
            key = to_wall(instant(old.start), read_zone(wish.tz)).isoformat()
            patches = {old.id: {'slot': key if self.look.begun(old) else first.key}}
        elif old.altered and deal.named:
            patches = {old.id: {'altered': False}}
        deal = deal._replace(patches=patches, columns=deal.columns | wish.columns(*STORED) | {
            'series': stored_stretches(wish.stretches)})
        if not SHAPE & set(deal.asked):
            return deal
        return self.series.spelled(deal, there, now, gentle=deal.code == 'calendar')

    def edit_back(self, deal: Deal, now: float) -> Deal:
        """The deal that lets a series have an occurrence again that it was left without."""
        old, wish = deal.old, deal.wish
        stretches = [unskipped(each, old.slot) for each in self.look.stretches(old.reservation)]
        slot = Slot(old.slot, wish.start, wish.end, wish.vms, wish.resource.id)
        self.series.refuse_impossible(wish, [(slot, old)], now)
        one = self.series.change_at(wish, slot, old, now)
        return deal._replace(
            changes=[one._replace(columns=one.columns | {'altered': False})], stretches=stretches,
            columns={'series': stored_stretches(stretches)}, clash='refuse',
            horizon=self.series.horizon(stretches, now))

    def cancel(self, found: list, now: float, why: str = '', ends: bool = False) -> None:
        """Cancels occurrences of a reservation; `ends`: nothing of its series comes after."""
        if not found:  # it has ended since it was looked for
            return
        first, columns = found[0], {}
        for each in found:
            if each.change is not None:
                self.bookings.drop_proposals(each.reservation, each.id)
        if first.repeats and ends:
            left = stretches_before(self.look.stretches(first.reservation),
                                    min(each.slot for each in found))
            columns['series'] = stored_stretches(left) if left else '[]'
        goes_on = first.repeats and not ends
        self.bookings.commit(Deal('released', self.wishes.carried_on(first),
                                  [given_up(each, now, altered=True) for each in found], first,
                                  columns, stretches=None if goes_on else []), now)
        if goes_on:  # so that there is a next one
            self.series.carry_on(first, now)
        only = NONE_OF_THEM
        if first.repeats:
            only = first.id if len(found) == 1 else None
        said = [why or f'cancelled by {self.service.actor.user}']
        said += [warning for each in found for warning in self.ends_with(each).get('warnings', ())]
        self.service.tell(now, 'released', '; '.join(said), first, only)

    def ends_with(self, found) -> dict:
        """What becomes of VMs of what is cancelled: as agreed of a server that was there."""
        if not found.existing:
            return {}
        if found.server or found.at_end in ('', 'delete'):
            return {'ends_with': found.at_end or 'delete'}
        return {'ends_with': 'delete', 'warnings': [
            f"the VMs of '{found.label}' are deleted; the agreed {found.at_end} is not done"]}

    def book_all(self, request: Request, now: float) -> list[tuple]:
        """Books all parts of a request: each one's wish, reservation, and what became of it."""
        for name in [request.label, *(part[0].label for part in request.parts)]:
            if request.name:  # else it is looked at when it is booked
                self.policy.refuse_taken(request.last.project, name, now)
        try:
            if len(request.parts) == len(request.parts[0]) == 1:
                return [self.book_part(request.last, '', now)]
            return choose(request.parts, lambda wish, _: self.book_part(wish, request.name, now),
                          kind_of)
        except NoCapacity as refusal:
            refusal.wish = self.summed(request, getattr(refusal, 'wish', request.last))
            if str(refusal) or len(request.parts) == 1 or self.reasons.lack(refusal.wish):
                raise
            raise self.apart(request, refusal) from None

    def apart(self, request: Request, refusal: NoCapacity) -> NoCapacity:
        """The refusal of parts of which each would have room, but not all together."""
        start, end = (format_time(instant(at), self.service.config.zone)
                      for at in refusal.wish.held)
        answer = NoCapacity(f"{refusal.placed} of the {len(request.parts)} parts of "
                            f"'{request.label}' have room together from {start} to {end}; ask for "
                            'fewer parts, for smaller ones or for another time')
        answer.wish = refusal.wish
        answer.others = {wish.resource.id for part in request.parts for wish in part}
        return answer

    def instead(self, request: Request, wish: Wish, field: str, now: float) -> None:
        """Books a request of which each part is otherwise in one field, as a wish is."""
        def other(each: Wish) -> Wish:
            return with_vms(each, wish.vms) if field == 'vms' else each._replace(
                start=wish.start, end=wish.end)
        if field == 'vms' and request.name:
            raise Invalid('of which part, the offer would not say')
        parts = [[*map(other, part)] for part in request.parts]
        self.book_all(request._replace(parts=parts), now)

    def book_part(self, wish: Wish, name: str, now: float) -> tuple:
        """Books one part of a request; a refusal tells which."""
        try:
            return wish, *self.book(wish, now, request=name)
        except NoCapacity as refusal:
            refusal.wish = wish
            raise

    def summed(self, request: Request, wish: Wish) -> Wish:
        """What a request asks for in all where one of its parts has found no room."""
        there = [part[0].amount for part in request.parts
                 if len(part) == 1 and part[0].resource.id == wish.resource.id]
        total = sum(there, NOTHING)
        return wish._replace(vms=total.vms, whole=total) if len(there) > 1 else wish

    def answer_all(self, request: Request, booked: list[tuple]) -> dict:
        """What was reserved: one reservation, or the parts of a request."""
        answers = [self.answer(reservation, done, wish) for wish, reservation, done in booked]
        return {'label': request.label, 'parts': answers} if request.name else answers[0]

    def answer(self, reservation: int, done: Iterable[dict], wish: Wish,
               occurrence: int | None = None) -> dict:
        """What was reserved, of a series the next occurrence and what became of each."""
        found = self.look.occurrence(occurrence) if occurrence else self.look.next_of(reservation)
        series = ({'booked_until': instant(found.booked_until), 'occurrences': [*done]}
                  if wish.stretches else {})
        return public(found) | series | ({'warnings': wish.warnings} if wish.warnings else {})

    def grant(self, proposal, now: float) -> None:
        """Makes a change that was proposed."""
        old = self.look.occurrence(proposal.occurrence)
        if old.state in OVER and proposal.code != BACK:
            old = self.look.next_of(proposal.reservation_id)
        asked, wish = json.loads(proposal.asked), restored_wish(proposal.wish)
        current = self.wishes.unaltered(old)
        if proposal.code != 'calendar':
            wish = wish._replace(**{
                name: current[name] for name in STORED
                if name not in (*asked, 'lead', 'repeat', 'tz', 'on_conflict')})
        self.bookings.drop_proposals(old.reservation,
                                     proposal.occurrence if proposal.alone else None)
        deal = self.edit(old, wish, asked, now, proposal.code, proposal.named, proposal.alone)
        self.bookings.commit(deal._replace(code='granted'), now)

    def commit_back(self, old, wish: Wish, now: float) -> Made | None:
        """Lets an occurrence be again that was left out."""
        try:
            return self.bookings.commit(self.edit(old, wish, ['occurrence'], now, BACK, True, True),
                                        now)
        except NoCapacity as refusal:
            conflict, = refusal.details.pop('conflicts')
            why = f"what was left out does not fit any more: {conflict['why']}"
            raise NoCapacity(why, **refusal.details) from None


# Waiting #####################################################################
#
# What has no room waits for it, in order of priority, then of age; what needs somebody's word is
# held for a while. Room that becomes free is given in the transaction of the next pass.


def kind_of_waiting(part: list[tuple]) -> tuple:
    """What tells a part that waits from another, as `kind_of` does."""
    return tuple((place.id, each.held_from, each.end, amount, each.server)
                 for each, place, amount in part)


class Waiting:
    """Requests that wait for room, and reservations that wait for a word."""

    def __init__(self, admission: Admission):
        self.admission, self.look, self.wishes = admission, admission.look, admission.wishes
        self.service, self.bookings = admission.service, admission.bookings
        self.policy, self.limits = admission.policy, admission.policy.limits

    def take(self, request: Request, now: float) -> dict:
        """Books a request, or lines it up if it may wait; inside a transaction."""
        try:
            with Attempt() if request.wait else nullcontext():
                return self.admission.answer_all(request, self.admission.book_all(request, now))
        except NoCapacity:
            if not request.wait:
                raise
        return self.line_up(request, now)

    def line_up(self, request: Request, now: float) -> dict:
        """Writes down a request that has no room now, and waits; inside a transaction."""
        if any(part[0].stretches for part in request.parts):
            raise Invalid(A_SERIES_WAITS)
        parts = [[wish for wish in map(self.wishes.as_now, part)
                  if wish.amount.within(self.policy.most_ever(wish))] for part in request.parts]
        without = (part[0] for part, left in zip(request.parts, parts) if not left)
        lacking = next(without, request.last)
        try:
            choose(parts, self.could_be, kind_of)
        except Conflict as refusal:
            refusal.wish = self.admission.summed(request, lacking)
            raise
        self.refuse_beyond_together([part[0] for part in parts], now)
        self.limits.refuse_many_waiting(request.last)
        return self.admission.answer_all(request,
                                         [self.wait_for(part, request, now) for part in parts])

    def could_be(self, wish: Wish, taken: list[Wish]) -> Wish:
        """A part that fits beside those before it where nothing else is booked, or NoCapacity."""
        beside = [each.amount for each in taken if each.resource.id == wish.resource.id]
        if not sum(beside, wish.amount).within(self.policy.most_ever(wish)):
            raise NoCapacity('')
        return wish

    def refuse_beyond_together(self, wishes: list[Wish], now: float) -> None:
        """Refuses what is beyond a limit together, on each resource and in all."""
        for id in dict.fromkeys([0, *(wish.resource.id for wish in wishes)]):  # 0: any resource
            there = [wish for wish in wishes if id in (0, wish.resource.id)]
            total = sum((wish.amount for wish in there), NOTHING)
            place = there[0].resource._replace(id=id)
            self.limits.refuse_beyond(there[0]._replace(resource=place, vms=total.vms, whole=total),
                                      now)

    def wait_for(self, wishes: list[Wish], request: Request, now: float) -> tuple:
        """Writes down one part of it, which waits for the first of some resources that has room."""
        wish = wishes[0]
        choices = [[each.resource.id, bool(each.whole), stored(each.whole or each.each)]
                   for each in wishes]
        made = self.bookings.commit(Deal('waiting', wish, [change_to(None, wish, now, waits=True)],
                                         columns={
                                             'waiting': int(now), 'priority': request.priority,
                                             'confirm': request.confirm, 'request': request.name,
                                             'choices': json.dumps(choices) if len(choices) > 1
                                             else ''}), now)
        places = ' or '.join(each.resource.name for each in wishes[:20])
        self.service.journal(now, 'waiting', f'{wish.vms} vms on {places} are not free',
                             made.reservation, wish.notify)
        return wish, made.reservation, []

    def choices(self, found) -> Iterator[tuple]:
        """The resources on one of which what waits can be, in order, and what it takes there."""
        wanted = [(resource, of_columns(columns) if whole else of_columns(columns) * found.vms)
                  for resource, whole, columns in json.loads(found.choices or '[]')]
        for resource, amount in wanted or [(found.resource_id, amount_of(found))]:
            if place := resource_of(resource):
                yield place, amount

    def admit_waiting(self, now: float) -> bool:
        """Gives room to those that wait, and frees what waited for a word in vain; whether those
        that wait are to be looked at once more, in their order.
        """
        more = self.admit_in_order(now)
        for each in self.look.search([('r.pending <= ?', int(now)), (NOT_OVER, None),
                                      (NEXT_OF_ITS, None)]):
            why = f"nobody has {'accepted' if each.confirm else 'approved'} it in time"
            for part in self.look.together(each):
                self.admission.cancel(self.look.live(part), now, why, ends=True)
        for each in rows('SELECT DISTINCT reservation_id AS reservation FROM proposal '
                         'WHERE until <= ?', int(now)):
            self.leave_as_it_was(each.reservation, now, 'nobody has approved the change in time')
        return more

    def admit_in_order(self, now: float) -> bool:
        """Gives room to those that are called, the first first.

        Who has waited for long keeps others back, and calls them when let in: they may come before
        the next that was called already. So the line is read anew then.
        """
        for request in self.waiting_requests(now):
            parts = [[(each, *choice) for choice in self.choices(each)] for each in request]
            try:
                choose(parts, lambda choice, _: self.let_in(*choice, now), kind_of_waiting)
            # without room, or beyond a limit within which it was when it was asked for
            except Conflict as error:
                self.try_later(request, not isinstance(error, NoCapacity), now)
                continue
            if any(each.waiting <= now - self.service.config.patience for each in request):
                return True
        return False

    def leave_as_it_was(self, reservation: int, now: float, why: str) -> None:
        """Drops what is asked of a reservation and its other parts, and tells of it."""
        for part in self.look.together(self.look.next_of(reservation)):
            if self.bookings.drop_proposals(part.reservation):
                self.service.tell(now, 'rejected', why, part)

    def waiting_requests(self, now: float) -> list[list]:
        """Some of those that wait and may have room now, in their order; parts together."""
        due = rows(f"""SELECT DISTINCT r.id, r.project, r.request FROM wait w INDEXED BY wait_due
                         CROSS JOIN reservation r ON r.id = w.reservation_id WHERE w.due <= ?
                         ORDER BY r.priority DESC, r.waiting, r.id LIMIT {MOST_TRIED}""", now)
        whole = {each.id for each in due}
        for project, request in {(each.project, each.request) for each in due if each.request}:
            whole |= {each.id for each in rows(
                "SELECT id FROM reservation WHERE request = ? AND request <> '' AND project = ? "
                'AND waiting IS NOT NULL', request, project)}
        found: dict = defaultdict(list)
        theirs = 'SELECT id FROM occurrence INDEXED BY occurrence_series WHERE reservation_id'
        condition, ids = self.look.among(theirs, [*whole])
        for each in self.look.search([(f'o.id IN ({condition})', ids), ('o.cancelled IS NULL',),
                                      ('o.end > ?', int(now))],
                                     tail='ORDER BY priority DESC, waiting, id'):
            found[(each.project, each.request) if each.request else each.id].append(each)
        over = whole - {each.reservation for request in found.values() for each in request}
        if over:
            self.leave_line(over)
            return self.waiting_requests(now)
        return [*found.values()]

    def leave_line(self, reservations: Iterable[int]) -> None:
        """Takes out of the line whose window is over; those that they kept back are called."""
        for each in reservations:
            for place in rows('SELECT resource_id, held_from, until FROM wait '
                              'WHERE reservation_id = ?', each):
                call_waiting(*place)
            run('DELETE FROM wait WHERE reservation_id = ?', each)
            remembered.change()

    def try_later(self, request: list, limited: bool, now: float) -> None:
        """Notes when those without room are tried again, if nothing is given back before: of a
        window that has begun, what is held by others goes by with the next change of level.
        """
        for each in request:
            names = {name for _, amount in self.choices(each) for name in amount.names}
            for wait in rows('SELECT id, resource_id FROM wait WHERE reservation_id = ?',
                             each.reservation):
                later = now + 60 if limited else each.held_from
                if later <= now:
                    later = self.next_change(wait.resource_id, names, now, each.end)
                change(Wait, wait.id, limited=limited, due=later)

    def next_change(self, resource: int, names: Iterable[str], now: float, until: int) -> float:
        """The next instant at which what is held of a resource changes, before an end."""
        tracks = ('', CLOSED, *names)
        found = [run('SELECT min(at) FROM step WHERE resource_id = ? AND track = ? AND at > ?',
                     resource, track, now).fetchone()[0] for track in tracks]
        found += [ledger.after(resource, track, now) for track in tracks]
        return min([until, *filter(None, found)])

    def let_in(self, found, place, amount: Amount, now: float) -> None:
        """Gives room on a resource to what waits, or raises a Conflict."""
        wish = self.wishes.carried_on(found)._replace(resource=place, each=amount // found.vms,
                                                      whole=amount if found.host else None)
        held = place.approval or found.confirm
        pending = int(now) + held if held else None
        self.bookings.commit(Deal('admitted', wish, [change_to(found, wish, now)], found, {
            'waiting': None, 'pending': pending, 'choices': '',
            'confirm': 0 if place.approval else found.confirm}), now)
        whose = ('an admin must approve it' if place.approval
                 else f'`accept {found.request or found.label}`')
        until = self.service.config.told_time(pending or now, found.tz)
        asks = f'there is room; {whose} until {until}' if pending else ''
        code, sentence = ('pending', asks) if pending else (
            'admitted',
            f'{found.vms} vms on {place.name}, after {format_duration(int(now) - found.waiting)}')
        self.service.tell(now, code, sentence, found)


# Offers ######################################################################
#
# What is said of what has no room: why, what is in the way, and what would fit instead, each offer
# decided like a request.


class Offers:
    """Explains refusals."""

    def __init__(self, service: Service, wishes: Wishes, reasons: Reasons, bookings: Bookings):
        self.service, self.look, self.wishes = service, reasons.look, wishes
        self.reasons, self.bookings = reasons, bookings

    @contextmanager
    def recording_refusal(self, wish: Wish, dry_run: bool) -> Iterator[None]:
        """Writes down that a request was refused for want of capacity or by a limit.

        Only the operator is told: who asks has the answer, and may have named anybody to notify.
        """
        try:
            yield
        except Conflict as refusal:
            if not dry_run and (isinstance(refusal, NoCapacity) or 'limit' in refusal.details):
                with transaction():
                    sentence = f"'{wish.label}' of {wish.user}: {refusal}"
                    journal(self.service.config, self.service.clock(), wish.user, 'refused',
                            sentence, None, project=wish.project, resource=wish.resource.id)
            raise

    @contextmanager
    def explaining(self, wish: Wish, old=None, deed: Callable[[Wish, str], Any] | None = None):
        """Makes of a bare NoCapacity one that says why; in a rehearsal also what would fit.

        Args:
          old: the occurrence that was to change
          deed: does what was asked with another wish, of which one field is otherwise
        """
        try:
            with Attempt() if rehearsal.on else nullcontext():
                yield
        except NoCapacity as refusal:
            if deed and not rehearsal.on:
                raise
            with undone():
                wish = self.wishes.as_now(getattr(refusal, 'wish', wish))
                why, more, offers = self.explained(refusal, wish, old, bool(deed))
                more |= refusal.details | (self.tested(deed, offers) if deed else {})
                raise NoCapacity(why, **more) from None

    def explained(self, refusal: NoCapacity, wish: Wish, old,
                  offering: bool) -> tuple[str, dict, dict]:
        """The sentence of a refusal, what is in the way, and what might be offered, best first."""
        if wish.stretches:  # a series tells by itself
            fitting = 0 if old else getattr(refusal, 'most_vms', 0)
            offers = [(fitting, with_vms(wish, fitting))] if fitting else []
            return str(refusal), {}, {'most_vms': offers}
        with self.bookings.as_if_without(old):  # it is not in its own way
            lack, why = self.reasons.lack(wish), str(refusal)
            if not offering:
                return why or self.reasons.why_not(wish, lack), {}, {}
            more = {} if why else self.reasons.in_the_way(wish, lack, old.reservation if old else 0)
            why = why or self.reasons.why_not(wish, lack)
            later = self.later(wish, getattr(refusal, 'others', ()))
            return why, more, {
                'next_start': [*itertools.islice(later, MOST_OFFERS)],
                'most_vms': [*self.reasons.fewer(wish, lack, old)],
                'longest': [*self.shorter(wish, old)]}

    def tested(self, deed: Callable[[Wish, str], Any], offers: dict[str, list]) -> dict:
        """Of each offer the first that would be admitted, decided as a request is."""
        found = {}
        for name, candidates in offers.items():
            for offer, wish in candidates:
                if self.would_do(deed, wish, OFFERS[name]):
                    found[name] = offer
                    break
        return found

    def would_do(self, deed: Callable[[Wish, str], Any], wish: Wish, field: str) -> bool:
        """Whether something can be done; it is undone."""
        try:
            with undone():
                deed(wish, field)
                return True
        except Error:
            return False

    def later(self, wish: Wish, others: Iterable[int]) -> Iterator[tuple[datetime, Wish]]:
        """The same later: where there is room, and when something ends that was in the way."""
        begin, need = max(wish.held[0], int(self.service.clock())), wish.held[1] - wish.held[0]
        ends = self.ends_after(wish, begin, others)
        for first, last in free_windows(wish.resource, wish.amount, begin, LAST.timestamp()):
            inside = [at for at in ends if first < at <= last - need]
            for at in [int(first), *inside] if last - first >= need else ():
                start = at + wish.lead
                yield instant(start), wish._replace(start=start, end=start + wish.end - wish.start)

    def ends_after(self, wish: Wish, begin: int, others: Iterable[int]) -> list[int]:
        """When things end that count against the same limits, wait, or are on some resources."""
        if not (others or standing().limits or standing().waits):
            return []
        most, later = 10 * MOST_OFFERS, ('o."end" > ?', begin)
        found = walk(self.service.clock(), WAYS['waiting'], [('o.due IS NOT NULL',), later], most)
        whose = [('project', 'o.of_project = ?', wish.project),
                 ('user', 'o.of_user = ?', wish.user)]
        whose += [('place', 'o.resource_id = ?', each) for each in others]
        for way, condition, value in whose:
            ways = self.look.overlapping([(f'{way}_live', 'o.due IS NOT NULL')], begin,
                                         ' AND o.due IS NOT NULL')
            found += walk(self.service.clock(), ways, [(condition, value), later], most)
        ends = run('SELECT "end" FROM occurrence WHERE id IN (SELECT value FROM json_each(?))',
                   json.dumps([id for _, id in found]))
        return sorted({end for end, in ends})[:most]

    def shorter(self, wish: Wish, old) -> Iterator[tuple[str, Wish]]:
        """The same as long as there is room, if that is longer than what it has already."""
        begin, _ = self.reasons.to_come(wish)
        first, last = next(free_windows(wish.resource, wish.amount, begin, wish.end), (None, 0))
        length, before = int(last) - wish.start, old.end - old.start if old else 0
        if first == begin and before < length < wish.end - wish.start:
            text = format_duration(length)
            # As it will be read: days are by the clocks.
            _, end = self.service.resolve(instant(wish.start), parse_duration(text))
            yield text, wish._replace(end=end)


class Operations(Service):
    """The service with all its parts, each of which has what it uses."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.look = Lookup(self)
        self.wishes, self.reasons = Wishes(self, self.look), Reasons(self, self.look)
        self.limits = Limits(self)
        self.policy = Policy(self, self.look, self.limits, self.reasons)
        self.bookings = Bookings(self, self.policy, self.reasons)
        self.series = Series(self, self.look, self.wishes, self.bookings)
        self.admission = Admission(self.look, self.wishes, self.series, self.reasons)
        self.waiting = Waiting(self.admission)
        self.offers = Offers(self, self.wishes, self.reasons, self.bookings)


# Approval ####################################################################
#
# A resource can ask that an admin approves what is reserved there. A new reservation is pending
# until then. A change of one that is approved takes effect at once as far as it takes nothing more;
# else it is kept as a proposal, which holds what it takes more, and what was approved goes on
# unchanged. Approved, the change is made; rejected, or forgotten for as long as the resource says,
# it is dropped.


class Approvals(Operations):
    """What admins say of what waits for their word."""

    @api('POST', '/reservation/<label>/approve', role=ADMIN)
    def approve(self, label: Label, project: Name = '',
                dry_run: bool = False) -> BookedAnswer | GroupAnswer:
        """Lets a pending reservation be, or a change of one that is approved.

        Example:
          python cmres.py approve lab --project biology
        """
        def deed(now: float) -> dict:
            found, pending, proposals = self.pending_of(label, project)
            for each in pending:
                self.settle(each, 'approved', now)
            for proposal, each in proposals:
                self.admission.grant(proposal, now)
                self.tell(now, 'approved', f'the change was approved by {self.actor.user}', each)
            return self.told_parts(label, pending or found)
        return self.carry_out(deed, dry_run)

    @api('POST', '/reservation/<label>/accept')
    def accept(self, label: Label, project: Name = '',
               dry_run: bool = False) -> BookedAnswer | GroupAnswer:
        """Takes the room that is held for a reservation of yours that had waited.

        Example:
          python cmres.py accept lab
        """
        with self.writing(dry_run) as now:
            _, pending, _ = self.pending_of(label, project)
            mine = [each for each in pending if each.confirm]
            if not mine:
                raise Conflict(f"'{label}' waits for an admin, who says: approve {label}")
            for each in mine:
                self.settle(each, 'accepted', now)
            return self.told_parts(label, pending)

    @api('POST', '/reservation/<label>/reject', role=ADMIN)
    def reject(self, label: Label, reason: Text = '', project: Name = '',
               dry_run: bool = False) -> BookedAnswer | GroupAnswer:
        """Refuses a pending reservation and frees what it held; of a request, all parts.

        A change of a reservation that was approved before is refused alone: that goes on as it was.

        Example:
          python cmres.py reject lab --reason 'not before the exam'
        """
        with self.writing(dry_run) as now:
            found, pending, proposals = self.pending_of(label, project)
            why = f"rejected by {self.actor.user}{f': {reason}' if reason else ''}"
            parts = self.look.together(pending[0]) if pending else found
            for each in parts if pending else ():
                self.admission.cancel(self.look.live(each), now, why, ends=True)
            for _, each in proposals if not pending else ():
                self.waiting.leave_as_it_was(each.reservation, now, f'the change was {why}')
            return self.told_parts(label, parts)

    def settle(self, found, deed: str, now: float) -> None:
        """Lets a reservation be that waited for a word."""
        self.bookings.commit(Deal('granted', self.wishes.carried_on(found), [], found,
                                  {'pending': None}), now)
        run('UPDATE occurrence SET due = ? WHERE reservation_id = ? AND due IS NOT NULL', now,
            found.reservation)
        self.tell(now, 'approved', f'{deed} by {self.actor.user}', found)

    def pending_of(self, label: str, project: str) -> tuple[list, list, list[tuple]]:
        """What a label means; what of it waits for a word, and what changes of it do."""
        parts = self.look.parts_of(label, project)
        found = ([self.look.mine(each.label, each.project) for each in parts]
                 or [self.look.mine(label, project)])
        pending = [each for each in found if each.pending is not None and each.state == 'pending']
        proposals = [(proposal, each) for each in found for proposal in rows(
            'SELECT * FROM proposal WHERE reservation_id = ? ORDER BY id', each.reservation)]
        if not pending and not proposals:
            raise Conflict(f"'{label}' is {found[0].state}, and waits for nobody's word")
        return found, pending, proposals

    def awaiting_approval(self) -> list[dict]:
        """What is pending, or of which a change is; as answers show it."""
        waits = ('SELECT id FROM reservation WHERE pending IS NOT NULL '
                 'UNION SELECT reservation_id FROM proposal')
        return [public(each) for each in self.look.search(
            [*self.look.visible(), (f'r.id IN ({waits})', None), (NOT_OVER, None),
             (NEXT_OF_ITS, None)], limit=1000)]

    def told_parts(self, label: str, found: list) -> dict:
        """Reservations as they are now: that of a label, or as the parts of a request."""
        answers = [public(self.look.occurrence(each.id)) for each in found]
        return answers[0] if found[0].label == label else {'label': label, 'parts': answers}


# Requests ####################################################################
#
# What people do with reservations: add, list, show, change, end them.


#: Seconds after which what a process has begun to write in pieces is dropped, if it does not go on.
GOES_ON = 60
#: What was written in pieces of which the last has not come: facts, whose values begin with the
#: instant at which they are dropped.
STAGED = "name > 'staged-' AND name < 'staged.'"


def not_real_yet() -> tuple[Callable, Callable]:
    """Tell of a reservation, and of an event, whether it is written but not real yet."""
    pieces = [piece for each in rows(f'SELECT value FROM fact WHERE {STAGED}')
              for piece in json.loads(each.value.partition(' ')[2])]
    return tuple(inside([(piece[n], piece[n + 2]) for piece in pieces]) for n in (0, 1))


def inside(ranges: list[tuple[int, int]]) -> Callable[[int], bool]:
    """Tells of a number whether one of some ranges has it: each begins after its first number."""
    ranges.sort()

    def told(number: int) -> bool:
        at = bisect_left(ranges, (number,)) - 1
        return at >= 0 and number <= ranges[at][1]
    return told


class Staged:
    """What is written in pieces, and is real when the last one is.

    Until then nothing starts and nobody is told. It holds its capacity from the first piece on, so
    that the last can't fail. What is not made real is erased, by the life cycle after a crash.
    """

    def __init__(self, service: Service, name: str = ''):
        self.service, self.name = service, name or f'staged-{secrets.token_hex(8)}'
        # Of each piece the last reservation and event before it, and its own last ones.
        self.pieces = json.loads(fact(name).partition(' ')[2] or '[]') if name else []
        self.dropping = False

    def begin(self) -> None:
        """Notes where a piece begins; all but `drop_all` are called inside a transaction."""
        self.before = self.newest()

    def newest(self) -> tuple:
        last = '(SELECT coalesce(max(id), 0) FROM {})'.format
        return run(f"SELECT {last('reservation')}, {last('event')}").fetchone()

    def set_aside(self, now: float) -> None:
        """Keeps what was written since it began from being looked at and told."""
        self.pieces.append([*self.before, *self.newest()])
        self.note(now + GOES_ON)

    def note(self, dropped: float) -> None:
        note_fact(self.name, f'{dropped:.0f} {json.dumps(self.pieces)}')

    def drop_all(self) -> None:
        """Erases all of it, some at a time."""
        while self.pieces:
            with self.service.writing() as now:
                self.drop_some(now + GOES_ON)

    def drop_some(self, now: float) -> None:
        """Erases the last of it that is there; the rest is to be dropped from an instant on."""
        first, told, last, last_told = self.pieces[-1]
        if not self.dropping:  # so that no id of an event comes twice, one stays
            self.dropping = True
            run("UPDATE event SET reservation_id = NULL, occurrence = NULL, project = '', "
                "code = 'dropped', sentence = 'many lines were begun and not all had room, so none "
                "is reserved' WHERE id = ?", last_told)
            run('DELETE FROM outbox WHERE event_id = ?', last_told)
        for last in some_of(deque(range(last, first, -1))):
            self.erase(last, now)
        last -= 1
        self.pieces[-1:] = [[first, told, last, last_told]] if last > first else []
        self.note(now)
        if not self.pieces:
            run('DELETE FROM fact WHERE name = ?', self.name)

    def erase(self, reservation: int, now: float) -> None:
        """Erases a reservation as if it had never been; one that has VMs is cancelled."""
        there = row('SELECT 1 AS one FROM server WHERE occurrence_id IN '
                    '(SELECT id FROM occurrence WHERE reservation_id = ?) LIMIT 1', reservation)
        if there:
            live = self.service.look.live(self.service.look.next_of(reservation))
            self.service.admission.cancel(live, now, 'not all of it had room', True)
        else:
            self.service.bookings.erase(reservation)


class Requests(Operations):
    """The operations on reservations."""

    @api('POST', '/reservation/', made='/reservation/<label>')
    @api('POST', '/reservation/add/<label>/<resource>/<start>/<end>')
    @api('POST', '/reservation/add/<label>/<cell>/<cloud>/<region>/<aggregate>/<vms>/<start>/<end>',
         resource=ANY)
    def add(self, label: NewLabel, resource: Place, start: When, end: When, vms: Count = 1,
            flavor: Name = '', image: Name = '', network: Name = '', key: Name = '',
            security_groups: Names = (), user_data: File = '', metadata: Pairs = None,
            server: Name = '', at_end: Name = '', notify: Names = (), lead: Span = None,
            description: Text = '', personal: bool = False, repeat: Repeat = '', tz: Zone = '',
            until: Day = None, count: Count = None, skip_dates: Names = (), holidays: Source = '',
            on_conflict: Clash = 'refuse', user: Name = '', project: Name = '', cell: Name = '',
            cloud: Name = '', region: Name = '', aggregate: Name = '', part: Parts = (),
            host: Hosts = (), wait: bool = False, priority: int = 0, confirm: Span = None,
            dry_run: bool = False, asked: dict = None) -> BookedAnswer | GroupAnswer:
        """Reserves machines from START to END, once or again and again.

        With an image, they are booted at the start and deleted at the end, or what --at-end says;
        with --server, a machine that you have is started and stopped instead. With neither,
        capacity is held and nothing boots. With a flavor, its vcpus and ram count against the
        resource as well. What doesn't fit is refused with what would; `add --file FILE` is `load
        FILE`.

        With --repeat it is a series by the clocks of --tz: START is when the first may begin, END
        says how long each takes. What begins in an hour that the change of the clocks leaves out
        begins an hour later by the clock; in an hour that comes twice, the first time. Its
        occurrences are reserved as far as the setting `horizon` says, and from day to day further.

        With --wait, what doesn't fit waits until it does: the higher priority first, then the
        older. For a place with gaps instead of a resource, the first in order of names that has
        room is taken.

        With several --part, also on several clouds, all of them are reserved or none; they are
        LABEL-1, LABEL-2 and so on, and what is said of LABEL is said of each. With --host, all of
        that host is reserved, where `resource sync --named` has told its name; m[01-05] are five
        parts.

        Example:
          python cmres.py add lab demo 2026-12-01T09:00 +2h --vms 3 --flavor m1.small --image cirros
          python cmres.py add class demo 2027-01-12T09:00 +2h --repeat 'weekly on tue,thu' --until
          2027-06-30 python cmres.py add exam 2027-01-12T09:00 +2h --part gpu:2 --part cpu:20
        """
        request = self.read_request(asked)
        refused = request.last._replace(label=label)

        def instead(wish: Wish, field: str) -> None:
            self.admission.instead(request, wish, field, self.clock())

        def deed(now: float) -> dict:
            with self.offers.explaining(request.last, None, instead):
                return self.waiting.take(request, now)
        with self.offers.recording_refusal(refused, dry_run):
            return self.carry_out(deed, dry_run)

    def read_request(self, asked: dict) -> Request:
        """What `add` was asked, resolved for each part and each resource on which that could be."""
        if asked['priority'] and self.actor.role != ADMIN:
            raise Forbidden('only an admin may give a priority')
        parts = self.parts_asked(asked)
        names = ([f"{asked['label']}-{n}" for n, _ in enumerate(parts, 1)] if len(parts) > 1
                 else [asked['label']])
        return Request(asked['label'],
                       [self.wishes_of(part | {'label': name}) for part, name in zip(parts, names)],
                       asked['wait'], asked['priority'], seconds_of(asked['confirm']))

    def parts_asked(self, asked: dict) -> list[dict]:
        """The arguments of each part of a request, a part for each host that is named."""
        if asked['part'] and asked['resource'] != ANY:
            raise Invalid(f"a resource or parts, not both: '{asked['resource']}' would be a part "
                          f"of its own")
        parts = [asked | part for part in read_argument('part', asked['part'], Parts, self.here)
                 ] if asked['part'] else [asked]
        parts = [part | {'host': host} for part in parts
                 for host in (read_argument('host', part['host'], Hosts, self.here) if part['host']
                              else [''])]
        if len(parts) > MOST_PARTS:
            raise Invalid(f'a request has at most {MOST_PARTS} parts, not {len(parts)}')
        return parts

    def wishes_of(self, asked: dict) -> list[Wish]:
        """A wish for each resource that is meant, without those where it could never be."""
        found, refusal, places = [], None, self.look.resources_at(asked)
        for place in places:
            try:
                found.append(self.wishes.read_wish(asked | {'resource': place.name}, place=place))
            except Error as error:
                refusal = refusal or error
        if not found:
            raise refusal
        return found

    @api('POST', '/reservation/load', made='/reservation/')
    def load(self, rows: Rows, partial: bool = False, dry_run: bool = False) -> LoadedAnswer:
        """Adds many reservations at once: all of them, or with --partial those that fit.

        Each refused line is named with its number and the reason. In a CSV file the first line
        names the fields. Does not read more than 100000 lines.

        Example:
          python cmres.py load class.csv --partial
        """
        unread, requests = [], []
        for number, given in enumerate(self.progress(rows), 1):
            self.shares.breathe()
            line = given.get('line', number)
            try:
                requests.append((line, self.read_request(self.read_line(given))))
            except Error as error:
                unread.append({'line': line, 'label': given.get('label', ''), 'error': str(error)})

        def deed(now: float) -> dict:
            taken, refused = self.take_lines(requests, partial, now)
            refused = by_line(unread + refused)
            if refused and not partial:
                raise Conflict(f'{len(refused)} of {len(rows)} lines were refused, so nothing was '
                               'reserved', refused=refused)
            return {'taken': taken, 'refused': refused}
        if dry_run or unread and not partial:
            return self.carry_out(deed, dry_run=True)
        try:
            taken, refused = self.take_in_turns(requests, partial)
        except NoCapacity:
            self.carry_out(deed, dry_run=True)
            raise NoCapacity(A_MOMENT_AGO) from None
        return {'taken': taken, 'refused': by_line(unread + refused)}

    def take_in_turns(self, requests: list[tuple], partial: bool) -> tuple[list, list]:
        """Takes lines, so that others can write between: what was taken, what not."""
        taken, refused, left, staged = [], [], deque(requests), Staged(self)
        try:
            while left:
                self.shares.breathe()
                with self.writing() as now:
                    staged.begin()
                    done, failed = self.take_lines(some_of(left), partial, now)
                    if not partial and (left or staged.pieces):
                        staged.set_aside(now)
                    if not left and staged.pieces:
                        run('DELETE FROM fact WHERE name = ?', staged.name)  # it is real now
                taken, refused = taken + done, refused + failed
        except NoCapacity:
            staged.drop_all()
            raise
        return taken, refused

    def take_lines(self, lines: Iterable[tuple], partial: bool, now: float) -> tuple[list, list]:
        """Takes what fits of some lines: what was taken, and what is refused, each with why."""
        taken, refused = [], []
        for line, request in lines:
            try:
                with Attempt(), self.offers.explaining(request.last):
                    taken.append(self.waiting.take(request, now))
            except Error as error:
                if not (partial or rehearsal.on):
                    raise NoCapacity('') from error
                refused.append({'line': line, 'label': request.label, 'error': str(error)})
        return taken, refused

    def read_line(self, given: dict) -> dict:
        """The arguments of `add` that one line of many stands for; empty cells are not given."""
        operation = API['add']
        given = {name: value for name, value in given.items() if name != 'line'
                 and value not in ('', None)}
        if 'dry_run' in given:
            raise Invalid('dry_run is for all lines together')
        defaults = {name: each.default for name, each in operation.parameters.items()}
        return defaults | bind(operation, given, self.here)

    @api('POST', '/reservation/generate', made='/reservation/')
    def generate(self, resource: Label = 'demo', count: Page = 10, seed: int = None,
                 flavor: Name = '', image: Name = '', dry_run: bool = False) -> LoadedAnswer:
        """Adds random reservations within the next week, for trying things out; those that don't
        fit are left out.

        Example:
          python cmres.py generate demo --count 20
        """
        chance, place, now = random.Random(seed), self.look.resource_row(resource), self.here.now
        most = min(place.vms or 8, 8)
        wanted = [{'label': f'random-{secrets.token_hex(4)}', 'resource': resource,
                   'start': now + timedelta(minutes=15 * chance.randrange(1, 600)),
                   'end': timedelta(minutes=30 * chance.randrange(1, 17)),
                   'vms': chance.randint(1, most),
                   'flavor': flavor, 'image': image} for _ in range(count)]
        return self.load(wanted, partial=True, dry_run=dry_run)

    @api('GET', '/reservation/')
    @api('GET', '/reservation/<label>')
    def list(self, label: Label = '', user: Name = '', project: Name = '', resource: Name = '',
             cell: Name = '', cloud: Name = '', region: Name = '', aggregate: Name = '',
             state: Names = (), start: When = None, end: When = None, limit: Page = 100,
             after: Cursor = '') -> list[ReservationAnswer]:
        """Lists reservations, the earliest first: those that are not over, or all that the filters
        meet.

        A label, a state or a window [START, END) that they overlap also finds what is over. Of a
        series only the present or next occurrence is listed; a label or a window finds all of them.
        Each page has at most --limit lines, fewer if they are long: the last page is the one
        without a line; --after START/ID of its last line gives the next, whatever moved. Long
        descriptions are cut, and
        user data is left out: `show` has them.

        Example:
          python cmres.py list --resource demo --state starting,active
        """
        for word in state:
            refuse_unknown_word('state', word, STATES)
        found = self.matching(label,
                              {'user': user, 'project': project, 'resource': resource, 'cell': cell,
                               'cloud': cloud, 'region': region, 'aggregate': aggregate},
                              state, start, end, limit, after)
        if label and not found and not self.look.labelled(label):
            raise NotFound(f"there is no reservation '{label}'")
        return [public(each) for each in found]

    def over(self, before: str, limit: int) -> list[dict]:
        """What has ended or was cancelled and has begun before now, the latest first."""
        filters, where = self.look.filtered(dict.fromkeys(('user', 'project', 'resource', *PLACE),
                                                          ''))
        begun = [('o.start <= ?', int(self.clock()))]
        return [public(each) for each in self.look.page(
            self.look.ways_by(filters, BOTH), where + begun, OVER, limit, before, latest=True,
            fields=BRIEF)]

    def matching(self, label: str, asked: dict, state: Iterable[str], start, end, limit: int,
                 after: str) -> list:
        """A page of what the filters of `list` meet."""
        where = self.look.window(start, end)
        if not (label or start or end):
            where.append((f'({NEXT_OF_ITS} OR NOT ({NOT_OVER}))',))
        if not (label or state or start or end):
            state = [word for word in STATES if word not in OVER]
        filters, also = self.look.filtered(asked)
        ways = self.look.ways(filters, state, int(where[0][1]) if start else None)
        if label:
            ways = [('series', f'1{self.look.within(filters)}')]
            also.append(self.look.among('o.reservation_id', self.look.labelled(label)))
        return self.look.page(ways, where + also, state, limit, after, fields=BRIEF)

    @api('GET', '/reservation/<label>/show')
    @for_each_part
    def show(self, label: Label, project: Name = '', occurrence: Day = None,
             tz: Zone = '') -> DetailAnswer | DetailGroupAnswer:
        """Shows all of one reservation: what was asked, its state, its servers; of a series also
        what comes.

        Example:
          python cmres.py show lab
        """
        found = self.look.mine(label, project, live=False, occurrence=occurrence)
        answer = public(found) | {'user_data': found.user_data,
                                  'servers': self.look.servers_of(found.id)}
        if not found.repeats:
            return answer
        comes = self.look.page([('series', f'o.reservation_id = {found.reservation}')],
                               [('o."end" > ?', int(self.clock()))], (), 1000, fields=BRIEF)
        return answer | {'on_conflict': found.on_conflict,
                         'booked_until': instant(found.booked_until), 'occurrences': [
            some_of_public(each, 'resource', 'vms', 'start', 'end', 'state') for each in comes]}

    @api('GET', '/server/')
    @api('GET', '/reservation/<label>/servers')
    def servers(self, label: Label = '', project: Name = '', occurrence: Day = None,
                kept: bool = False, tz: Zone = '') -> list[ServerAnswer | KeptAnswer]:
        """Lists the servers of a reservation: state, addresses, and when each was planned, begun
        and ready.

        With --kept, those that were stopped or shelved at their end and stay: of a label, or all.

        Example:
          python cmres.py servers lab
          python cmres.py servers --kept
        """
        if kept:
            return [public(each) for each in self.look.kept_servers(label, project)]
        if not label:
            raise Invalid('say which: the label of a reservation, or --kept')
        found = self.look.parts_of(label, project)
        return [line for each in found or [None] for line in self.look.servers_of(self.look.mine(
            each.label if each else label, each.project if each else project, live=False,
            occurrence=occurrence).id)]

    @api('GET', '/reservation/<label>/duration')
    @for_each_part
    def duration(self, label: Label, project: Name = '') -> DurationAnswer | DurationGroupAnswer:
        """Tells how long a reservation is.

        Example:
          python cmres.py duration lab
        """
        found = self.look.mine(label, project, live=False)
        seconds = found.end - found.start
        return {'label': label, 'duration': format_duration(seconds), 'seconds': seconds}

    @api('PATCH', '/reservation/<label>')
    @for_each_part
    def update(self, label: Label, resource: Label = None, start: When = None, end: When = None,
               vms: Count = None, flavor: Name = None, image: Name = None, network: Name = None,
               key: Name = None, security_groups: Names = None, user_data: File = None,
               metadata: Pairs = None, at_end: Name = None, notify: Names = None, lead: Span = None,
               description: Text = None, personal: bool = None, host: Name = None,
               repeat: Repeat = None, until: Day = None, count: Count = None,
               skip_dates: Names = None, holidays: Source = None, on_conflict: Clash = None,
               user: Name = None, rename: NewLabel = None, occurrence: Day = None,
               following: bool = False, tz: Zone = '', project: Name = '',
               dry_run: bool = False, asked: dict = None) -> BookedAnswer | GroupAnswer:
        """Changes a reservation, all of it or nothing.

        A new start alone moves it with its length; a new end alone makes it longer or shorter. One
        that has begun keeps its start, its place and what its machines are made of. Of a series,
        all that has not begun changes; with --occurrence only that one, and with --following those
        after it as well. An occurrence that was changed on its own lets the others be, and they it.

        Example:
          python cmres.py update lab --start 2026-12-01T10:00 --vms 5
          python cmres.py update class --occurrence 2027-02-02 --start 2027-02-03T09:00
        """
        apart = ('label', 'rename', 'project', 'dry_run', 'occurrence', 'following')
        asked = {name: value for name, value in asked.items()
                 if value is not None and name not in apart and (name, value) != ('tz', '')}
        if following and not occurrence:
            raise Invalid('--following needs an --occurrence, from which on things change')
        return self.alter(label, project, asked | ({'label': rename} if rename else {}), dry_run,
                          occurrence=occurrence, alone=bool(occurrence) and not following)

    @api('POST', '/reservation/<label>/extend')
    @for_each_part
    def extend(self, label: Label, by: Span, project: Name = '', occurrence: Day = None,
               tz: Zone = '', dry_run: bool = False) -> BookedAnswer | GroupAnswer:
        """Lets a reservation end later; works until its end. Of a series, only the present or next
        occurrence.

        Example:
          python cmres.py extend lab +1h
        """
        if by <= timedelta(0):
            raise Invalid(f'by: {to_plain(by)} is no length to extend by; write +1h')
        return self.prolong(label, project, occurrence, lambda old: instant(old.end) + by,
                            'updated', dry_run)

    @api('POST', '/reservation/<label>/keep')
    @for_each_part
    def keep(self, label: Label, until: When, project: Name = '', tz: Zone = '',
             dry_run: bool = False) -> BookedAnswer | GroupAnswer:
        """Lets what runs now go on until a later instant, if that fits; a series goes on after that
        as planned.

        Example:
          python cmres.py keep lab +2h
        """
        def end(old) -> datetime:
            last = instant(old.end) + until if isinstance(until, timedelta) else until
            if self.clock() < old.held_from:
                raise Conflict(f"'{label}' has not begun; `update` moves its end")
            if last.timestamp() <= old.end:
                raise Invalid(f'until: {to_plain(last)} is not after the end, '
                              f'{to_plain(instant(old.end))}')
            return last
        return self.prolong(label, project, None, end, 'kept', dry_run)

    def prolong(self, label: str, project: str, occurrence: Day | None,
                end: Callable[[Any], datetime], code: str, dry_run: bool) -> dict:
        """Lets an occurrence end at another instant; no cloud is asked, so in one transaction."""
        def deed(now: float) -> dict:
            old = self.look.mine(label, project, occurrence=occurrence)
            asked = {'end': end(old)}
            place = resource_of(old.resource_id)
            wish = self.wishes.read_wish(self.wishes.unaltered(old) | asked, old, asked,
                                         place=place)
            return self.altered(old, wish, asked, now, code, named=not old.repeats,
                                only=bool(old.repeats))
        return self.carry_out(deed, dry_run)

    @api('POST', '/reservation/<label>/skip')
    @for_each_part
    def skip(self, label: Label, project: Name = '', occurrence: Day = None, undo: bool = False,
             tz: Zone = '', dry_run: bool = False) -> BookedAnswer | GroupAnswer:
        """Leaves out the next occurrence, which must not have begun.

        With --undo, an occurrence of a series that was left out, skipped or cancelled by itself
        comes back if it fits, as the series has it now: the next of them, or that of --occurrence,
        also of `skip_dates`.

        Example:
          python cmres.py skip lab
          python cmres.py skip class --occurrence 2027-02-02 --undo
        """
        if undo:
            return self.put_back(label, project, occurrence, dry_run)
        with self.writing(dry_run) as now:
            found = self.look.mine(label, project, occurrence=occurrence)
            if now >= found.held_from and found.repeats and not occurrence:
                coming = [('r.id = ?', found.reservation), (NOT_OVER, None),
                          ('o.held_from > ?', now)]
                found = (self.look.search(coming, limit=1) or [found])[0]
            if now >= found.held_from:
                raise Conflict(f"'{label}' has begun; `delete` ends it")
            self.admission.cancel([found], now, f'skipped by {self.actor.user}')
            return public(self.look.occurrence(found.id))

    def put_back(self, label: str, project: str, occurrence: Day | None, dry_run: bool) -> dict:
        """Lets a series have an occurrence again that was left out."""
        def deed(now: float) -> dict:
            found = self.look.mine(label, project, live=False)
            slot, old = self.left_out(found, occurrence, now)
            if found.over <= now:
                self.policy.refuse_taken(found.project, found.label, now)
            place = resource_of(slot.resource, removed=True)
            wish = self.wishes.carried_on(found)._replace(
                resource=place, start=slot.start, end=slot.end, vms=slot.vms, on_conflict='refuse')
            if not old:  # it was never there
                one = self.series.change_at(wish, slot, None, now).after
                gone = change_to(None, one, now, slot.key, waits=True, **unheld(now))
                self.bookings.commit(Deal('left out', wish, [gone], found), now)
            id = row('SELECT id FROM occurrence WHERE reservation_id = ? AND slot = ?',
                     found.reservation, slot.key).id
            if self.admission.commit_back(self.look.occurrence(id), wish, now):
                why = f'{self.actor.user} has put back what was left out on '
                self.journal(now, 'updated', why + self.config.told_time(slot.start),
                             found.reservation, wish.notify, id)
            return public(self.look.occurrence(id))
        return self.carry_out(deed, dry_run)

    def left_out(self, found, asked: Day | None, now: float) -> tuple[Slot, Any]:
        """The occurrence that a series was left without at an instant or on a date, else next; and
        its row if any.
        """
        if not found.repeats:
            raise Conflict(f"'{found.label}' is no series; reserve it again with `add`")
        begin, until, on = int(now), 2**62, ''
        if asked:
            begin, until, on = self.span_of(asked, read_zone(found.tz))
        there = {each.slot: each for each in rows(
            'SELECT * FROM occurrence WHERE reservation_id = ? AND "end" > ?',
            found.reservation, int(now))}
        stretches = [each._replace(skips=()) for each in self.look.stretches(found.reservation)]
        last = max(self.series.horizon(stretches, now), until if asked else 0, begin + 1)
        for slot in all_slots(stretches, now, last):
            old = there.get(slot.key)
            meant = begin <= slot.start < until or old and begin <= old.start < until
            gone = old.cancelled is not None if old else asked
            if meant and gone and slot.start - found.lead > now:
                return slot, old
        raise NotFound(f"'{found.label}' has no occurrence to come that was left out"
                       f"{f' on {on}' if on else ''}")

    def alter(self, label: str, project: str, asked: dict, dry_run: bool, code: str = 'updated',
              occurrence: datetime | None = None, alone: bool = True) -> dict:
        """Changes a reservation, whose cloud is asked before; `alone`: no later occurrence."""
        if not asked.keys() - {'tz'}:
            raise Invalid('say what to change, such as --end or --vms')
        # what the cloud was asked about may be out of date by the time we write
        for _ in range(10):
            old, stretches, key = self.to_alter(label, project, occurrence, asked)
            only = alone and bool(occurrence) and bool(old.repeats)
            self.refuse_common(old, asked, occurrence, only)
            stretches = [] if only else stretches
            wish = self.wishes.read_wish(self.wishes.unaltered(old) | asked, old, asked, stretches,
                                         key)
            named = bool(occurrence) and not only

            def deed(now: float) -> dict | None:
                current, series = self.look.occurrence(old.id), self.look.stretches(old.reservation)
                if any(getattr(current, name) != getattr(old, name) for name in UNCHANGED) or (
                        stretches and series != stretches):
                    return None
                return self.altered(current, wish, asked, now, code, named, only)
            with self.shares.paced():
                answer = self.carry_out(deed, dry_run)
            if answer:
                return answer
        raise Conflict(f"'{label}' is being changed by others all the time; try again")

    def altered(self, old, wish: Wish, asked: dict, now: float, code: str, named: bool,
                only: bool) -> dict:
        """Changes what was read in the same transaction, and answers; nothing if all is the same.

        Args:
          named: it was named, so that it changes also if it was changed on its own before
          only: no other occurrence changes
        """
        def deal(wish: Wish, *otherwise: str) -> Deal:
            return self.admission.edit(old, wish, {*asked, *otherwise}, now, code, named, only)
        wanted = deal(wish)
        done = wanted.same
        if not self.admission.is_as_before(wanted):
            with self.offers.explaining(wish, old, lambda *other: self.bookings.commit(
                    deal(*other), now)):
                made = self.bookings.commit(wanted, now)
            done = made.done if made else []
            if made:
                self.tell_change(old, wish, asked, done, code, now)
        return self.admission.answer(old.reservation, done, wish, old.id if only else None)

    def refuse_common(self, old, asked: dict, occurrence: datetime | None, only: bool) -> None:
        """Refuses to change for some occurrences of a series what all of them have in common."""
        own = OWN | {'tz', 'on_conflict'} | (set() if only else REPEATING)
        if old.repeats and occurrence and asked.keys() - own:
            common = min(asked.keys() - own).replace('_', ' ')
            raise Invalid(f'the {common} is the same for all occurrences; some alone can have '
                          f"another {', '.join(sorted(OWN))}")

    def to_alter(self, label: str, project: str, occurrence: datetime | None, asked: dict) -> tuple:
        """The occurrence that a change is told for, its stretches, the slot from which on."""
        old = self.look.mine(label, project, occurrence=occurrence)
        key = old.slot
        # all that has not begun
        if old.repeats and not occurrence and asked.keys() & (OWN | REPEATING):
            coming = self.look.search([('r.id = ?', old.reservation), (NOT_OVER, None),
                                       ('o.held_from > ?', self.clock())])
            # One that was moved on its own is no measure for the others.
            old = next((each for each in coming if not each.altered), (coming or [old])[0])
            key = min((each.slot for each in coming), default=old.slot)
        return old, self.look.stretches(old.reservation), key

    def tell_change(self, old, wish: Wish, asked: dict, done: list, code: str, now: float) -> None:
        """Writes down that a reservation was changed."""
        self.journal(now, code,
                     f"{self.actor.user} changed: {', '.join(sorted(asked.keys() - {'tz'}))}",
                     old.reservation, wish.notify, NONE_OF_THEM if done or not old.repeats else
                     None if wish.stretches else old.id)

    @api('DELETE', '/reservation/<label>')
    @api('DELETE', '/reservation/')
    @api('DELETE', '/reservation/delete/<label>')
    @api('POST', '/reservation/delete/<label>')
    @api('DELETE',
         '/reservation/delete/<label>/<cell>/<cloud>/<region>/<aggregate>/<vms>/<start>/<end>')
    @api('POST',
         '/reservation/delete/<label>/<cell>/<cloud>/<region>/<aggregate>/<vms>/<start>/<end>')
    def delete(self, label: Label = '', user: Name = '', project: Name = '', resource: Name = '',
               cell: Name = '', cloud: Name = '', region: Name = '', aggregate: Name = '',
               vms: Count = None, start: When = None, end: When = None, count: Count = None,
               occurrence: Day = None, following: bool = False, kept: bool = False, tz: Zone = '',
               dry_run: bool = False) -> list[CancelledAnswer | KeptAnswer]:
        """Cancels a reservation: its capacity is free at once, and its VMs are deleted.

        Give a label, or filters that must all match exactly (start and end too); without a label,
        --count must say how many that hits. Nothing that is over is touched. Of a series,
        --occurrence cancels only that one, and with --following those after it as well. With
        --kept, nothing is
        cancelled: the VMs are deleted that were stopped or shelved at the end and stay.

        Example:
          python cmres.py delete --resource demo --user eva --dry-run
        """
        asked = {'user': user, 'project': project, 'resource': resource, 'cell': cell,
                 'cloud': cloud, 'region': region, 'aggregate': aggregate}
        if not any([label, vms, start, end, *asked.values()]):
            raise Invalid('say which: a label, or filters such as --resource and --user')
        if kept:
            return self.delete_kept(label, project, dry_run)
        begin, until = self.resolve(start or FIRST, end or LAST)
        exact = [('o.vms = ?', vms), ('o.start = ?', start and begin),
                 ('o."end" = ?', end and until)]
        if (occurrence or following) and not (label and occurrence):
            raise Invalid('--occurrence and --following need a label, and --following an '
                          '--occurrence')
        with self.writing(dry_run) as now:
            if occurrence:
                found = [self.look.mine(each, project, occurrence=occurrence) for each in (
                    [part.label for part in self.look.parts_of(label, project)] or [label])]
                for each in found:
                    self.admission.cancel(self.look.live(each, each.slot) if following else [each],
                                          now, ends=following)
            else:
                found = self.next_that_meet(label, asked, [each for each in exact if each[1]])
                self.refuse_uncounted(found, label, count, dry_run)
                for each in found:
                    self.admission.cancel(self.look.live(each), now, ends=True)
            lines = in_lines(self.look.in_order([each.id for each in found]))
            return [line | self.admission.ends_with(each) for line, each in zip(lines, found)]

    def delete_kept(self, label: str, project: str, dry_run: bool) -> Rows:
        """Deletes the VMs of a label that stay after their end; what they hold is free at once."""
        if not label:
            raise Invalid('--kept needs the label of a reservation')
        with self.writing(dry_run) as now:
            found = self.look.kept_servers(label, project)
            if len({each.project for each in found}) > 1:
                raise in_several(label, found)
            if not found:
                raise NotFound(f"no VM of '{label}' was stopped or shelved at its end and stays")
            for each in () if rehearsal.on else found:
                change(Server, each.id, goal='delete', state='shutoff', due=now)
            for reservation in {each.reservation for each in found}:
                self.bookings.count_stopped(reservation, now)
            self.journal(now, 'released',
                         f'{self.actor.user} deletes {len(found)} VMs that stayed: '
                         f"{', '.join(each.name for each in found[:20])}", found[0].reservation,
                         (), NONE_OF_THEM)
            return [public(each) for each in found]

    def next_that_meet(self, label: str, asked: dict, exact: list) -> list:
        """Of each reservation that meets filters, the present or next occurrence."""
        filters, where = self.look.filtered(asked)
        where += [*exact, (NOT_OVER,), (NEXT_OF_ITS,)]
        ways = self.look.ways_by(filters, BOTH[:1])
        if label:
            ways = [('series', f'1{self.look.within(filters)}')]
            where.append(self.look.among('o.reservation_id', self.look.labelled(label)))
        return self.look.page(ways, where, (), 2**31)

    def refuse_uncounted(self, found: list, label: str, count: int | None, dry_run: bool) -> None:
        """Refuses a delete of none, of another number than said, or in several projects."""
        if not found:
            raise NotFound(f"there is no reservation {shown(label) + ' ' if label else ''}that is "
                           f"not over{'' if label else ' and meets all of these filters'}")
        if label and len({each.project for each in found}) > 1:
            refusal = in_several(label, found)
            found[:] = [each for each in found if each.project == self.actor.project]
            if not found:
                raise refusal
        if (not label or count) and count != len(found) and not dry_run:
            raise Conflict(f'this would cancel {len(found)} reservations; say --count {len(found)} '
                           f'to do it',
                           labels=[each.label for each in found[:100]], count=len(found))

    @api('GET', '/resource/<resource>/find')
    def find(self, resource: Label, duration: Span, vms: Count = 1, flavor: Name = '',
             lead: Span = None,
             after: When = None, before: When = None, limit: Page = 10) -> list[SlotAnswer]:
        """Finds the earliest slots that are free for so many machines for so long.

        Each slot says from when until when it is free. Looks a year ahead unless --before says how
        far.

        Example:
          python cmres.py find demo 2h --vms 4
        """
        place = self.look.resource_row(resource)
        if duration < timedelta(seconds=1):
            raise Invalid('duration: a slot has at least one second')
        begin, until = self.resolve(after or self.here.now, before or timedelta(days=366))
        begin = max(begin, int(self.clock()))
        amount = self.wishes.each_takes(self.wishes.ask_cloud(place, {'flavor': flavor}, [])) * vms
        need, ahead = duration.total_seconds(), seconds_of(lead)
        slots = ((first, last) for first, last in free_windows(place, amount, begin - ahead, until)
                 if last - first >= need + ahead)
        return [{'start': instant(int(first + ahead)), 'until': instant(int(last)),
                 'duration': format_duration(last - first - ahead), 'vms': vms}
                for (first, last), _ in zip(slots, range(limit))]

    @api('GET', '/resource/<resource>/usage')
    def usage(self, resource: Label, start: When = None, end: When = None) -> list[UsageAnswer]:
        """Tells how much of a resource is held, when; by whom it doesn't tell.

        Shows the next 7 days unless --start or --end say otherwise.

        Example:
          python cmres.py usage demo --end +1d
        """
        place = self.look.resource_row(resource)
        begin, until = self.resolve(start or self.here.now, end or timedelta(days=7))
        levels = [*steps(place.id, begin, until, capacity(place).names), (until, NOTHING)]
        return [{'start': instant(at), 'end': instant(after), **in_figures(held),
                 'free_vms': 0 if dict(held.classes).get(CLOSED) else None if place.vms is None else
                 place.vms - held.vms} for (at, held), (after, _) in zip(levels, levels[1:])]


# Plan ########################################################################
#
# What operators do: resources, their capacity over time, maintenance; and the proof that all adds
# up.


class Plan(Operations):
    """The operations on resources, their capacity over time, and limits."""

    @api('POST', '/limit/', role=ADMIN, made='/limit/')
    def limit_add(self, project: Name = '', user: Name = '', resource: Label = '',
                  most_vms: Count = None, longest: Span = None, ahead: Span = None,
                  least_notice: Span = None, vcpu_hours: Count = None, waiting: int = None,
                  exempt: Span = None, dry_run: bool = False) -> LimitAnswer:
        """Limits what a project or a user may reserve; with neither, every project that has no
        limit of its own.

        With --resource it counts there alone, else everywhere together. What begins within --exempt
        from now and takes no longer than a day (`exempt_longest`) is not limited: tonight's idle
        VMs may be used.

        Example:
          python cmres.py limit add --project biology --most-vms 20 --longest 7d --ahead 30d
          --exempt 4h
        """
        figures = {'most_vms': most_vms, 'longest': longest, 'ahead': ahead,
                   'least_notice': least_notice, 'vcpu_hours': vcpu_hours, 'waiting': waiting}
        if all(each is None for each in figures.values()):
            raise Invalid(f"say what is limited: {', '.join(figures)}")
        seconds = {name: seconds_of(each) if isinstance(each, timedelta) else each
                   for name, each in figures.items()}
        with self.writing(dry_run) as now:
            id = insert(Limit, project=project, user=user, resource=self.look.id_of(resource),
                        **seconds, added=int(now), exempt=seconds_of(exempt))
            self.journal(now, 'limit', f"limited {user or project or 'every project'}")
            return self.limit_public(row(f'{LIMITS} WHERE l.id = ?', id))

    @api('GET', '/limit/')
    def limit_list(self) -> list[LimitAnswer]:
        """Lists the limits; of those for others, only an admin sees any.

        Example:
          python cmres.py limit list
        """
        found = rows(f'{LIMITS} ORDER BY l.id')
        return [self.limit_public(each) for each in found if self.actor.role == ADMIN
                or each.project in ('', self.actor.project) and each.user in ('', self.actor.user)]

    @api('DELETE', '/limit/<id>', role=ADMIN)
    def limit_delete(self, id: int, dry_run: bool = False) -> LimitAnswer:
        """Takes a limit away.

        Example:
          python cmres.py limit delete 1
        """
        with self.writing(dry_run) as now:
            found = row(f'{LIMITS} WHERE l.id = ?', id)
            if not found:
                raise NotFound(f'there is no limit {id}')
            run('DELETE FROM limits WHERE id = ?', id)
            remembered.change()
            run('UPDATE wait SET due = 0 WHERE limited')
            self.journal(now, 'limit', f'took limit {id} away')
            return self.limit_public(found)

    def limit_public(self, found) -> dict:
        """A limit as answers show it: lengths in words."""
        lengths = ('longest', 'ahead', 'least_notice', 'exempt')
        return {name: format_duration(value) if name in lengths and value is not None else value
                for name, value in (public(found) | {'waiting': found.waiting}).items()}

    @api('POST', '/resource/', role=ADMIN, made='/resource/<name>')
    def resource_add(self, name: NewLabel, cell: Name = '', cloud: Name = '', region: Name = '',
                     aggregate: Name = '', vms: Most = UNLIMITED, vcpus: Most = UNLIMITED,
                     ram: Most = UNLIMITED, classes: Classes = None, mode: Name = '',
                     hold: Span = None, approval: Span = None, no_show: Span = None,
                     dry_run: bool = False) -> ResourceNowAnswer:
        """Adds a resource; a figure that isn't given is unlimited.

        With --classes, other resource classes of Placement count as well: what flavors take of them
        stands in their extra specs, such as resources:CUSTOM_GPU=1.

        Example:
          python cmres.py resource add india --cloud simulated --vms 40 --vcpus 320 --ram 655360
        """
        with self.writing(dry_run) as now:
            self.policy.refuse_taken_resource(name)
            figures = {figure: None if most == UNLIMITED else most
                       for figure, most in (('vms', vms), ('vcpus', vcpus), ('ram', ram))}
            lengths = self.read_seconds(hold=hold, approval=approval, no_show=no_show)
            self.refuse_idle(self.read_mode(mode), lengths)
            insert(Resource, name=name, cell=cell, cloud=cloud, region=region, aggregate=aggregate,
                   **figures, mode=self.read_mode(mode), **lengths,
                   classes=known_classes('', classes), hosts='[]', named='', added=int(now))
            self.journal(now, 'resource', f"added the resource '{name}'")
            return self.resource_show(name)

    @api('GET', '/resource/')
    def resource_list(self, cell: Name = '', cloud: Name = '', region: Name = '',
                      aggregate: Name = '') -> list[ResourceAnswer]:
        """Lists the resources: their places and what they hold at most.

        Example:
          python cmres.py resource list --cloud simulated
        """
        return [self.resource_public(each)
                for each in self.look.places(cell, cloud, region, aggregate)]

    @api('GET', '/resource/<name>')
    def resource_show(self, name: Label) -> ResourceNowAnswer:
        """Shows a resource, and what is held of it now.

        Example:
          python cmres.py resource show demo
        """
        found = self.look.resource_row(name)
        held = level(found.id, self.clock(), capacity(found).names)
        return self.resource_public(found) | {'held_now': in_figures(held)}

    @api('PATCH', '/resource/<name>', role=ADMIN)
    def resource_update(self, name: Label, rename: NewLabel = '', cell: Name = None,
                        cloud: Name = None, region: Name = None, aggregate: Name = None,
                        vms: Most = None, vcpus: Most = None, ram: Most = None,
                        classes: Classes = None, mode: Name = None, hold: Span = None,
                        approval: Span = None, no_show: Span = None, force: bool = False,
                        dry_run: bool = False) -> ResourceChangedAnswer:
        """Changes a resource; `unlimited` takes a limit away.

        A capacity below what is held already needs --force; nothing is cancelled then, and the
        answer lists the occurrences that no longer fit, the latest added first.

        Example:
          python cmres.py resource update demo --vms 8 --dry-run
        """
        asked = {'name': rename or None, 'cell': cell, 'cloud': cloud, 'region': region,
                 'aggregate': aggregate, 'vms': vms, 'vcpus': vcpus, 'ram': ram,
                 'mode': mode if mode is None else self.read_mode(mode),
                 **self.read_seconds(**{field: length for field, length in (
                     ('hold', hold), ('approval', approval), ('no_show', no_show))
                                        if length is not None})}
        new = {field: None if value == UNLIMITED else value for field, value in asked.items()
               if value is not None}
        with self.writing(dry_run) as now:
            found = self.look.resource_row(name)
            if new.keys() & {'mode', *ASKED_BY_NOVA}:
                self.refuse_idle(new.get('mode', found.mode), found._asdict() | new)
            if rename and rename != name:
                self.policy.refuse_taken_resource(rename)
            if classes:
                new['classes'] = known_classes(found.classes, classes)
            if new:
                change(Resource, found.id, **new)
            before, found = found, self.look.resource_row(rename or name)
            self.rehold_changes(found, now)
            homeless = (self.no_longer_fitting(found, now)
                        if lowered(capacity(before), capacity(found)) else [])
            self.refuse_homeless(name, [] if force else homeless)
            self.journal(now, 'resource',
                         f"changed the resource '{name}': {', '.join(new) or 'nothing'}")
            return self.resource_public(found) | {'no_longer_fit': homeless}

    @api('DELETE', '/resource/<name>', role=ADMIN)
    def resource_delete(self, name: Label, dry_run: bool = False) -> ResourceAnswer:
        """Removes a resource that nothing is reserved on any more; its history stays.

        Example:
          python cmres.py resource delete demo
        """
        with self.writing(dry_run) as now:
            found = self.look.resource_row(name)
            busy = self.look.page([('place_live',
                                    f'o.resource_id = {found.id} AND o.due IS NOT NULL')],
                                  [('o.held_until > ?', int(now))], (), limit=100)
            needed = rows("SELECT label FROM reservation WHERE series <> '' AND over > ? AND "
                          "series LIKE ? LIMIT 100",
                          int(now),
                          f'%"resource":{found.id},%')  # a series may come back to it
            if busy or needed:
                raise Conflict(f"'{name}' still has reservations; delete or move them first",
                               labels=sorted({each.label for each in busy + needed}))
            change(Resource, found.id, removed=int(now))
            self.journal(now, 'resource', f"removed the resource '{name}'")
            return self.resource_public(found)

    def resource_public(self, found) -> dict:
        """A resource as answers show it."""
        return {name: value for name, value in public(found).items() if name != 'removed'}

    def read_seconds(self, **lengths: timedelta | None) -> dict[str, int]:
        """Lengths as the store has them; none is 0."""
        return {name: seconds_of(length) for name, length in lengths.items()}

    def read_mode(self, mode: str) -> str:
        """The mode of a resource as the store has it."""
        refuse_unknown_word('mode', mode, ('open', *MODES), '')
        return '' if mode == 'open' else mode

    def refuse_idle(self, mode: str, values: dict) -> None:
        """Refuses a length that would do nothing: for an open resource, Nova does not ask cmres."""
        for name in ASKED_BY_NOVA:
            if values.get(name) and not mode:
                option = name.replace('_', '-')
                raise Invalid(f'{name}: {format_duration(values[name])} does nothing on a resource '
                              'that is open to everybody; say --mode exclusive or --mode shared, '
                              f'or --{option} 0s')

    @api('POST', '/resource/sync', role=ADMIN)
    def resource_sync(self, cloud: Name, aggregates: Names = (), mode: Name = '', hold: Span = None,
                      named: bool = None, force: bool = False,
                      dry_run: bool = False) -> list[DifferenceAnswer]:
        """Reads host aggregates of a cloud, makes resources of them or updates those, and marks
        them for Nova.

        The vcpus, ram and other classes of a resource become what Placement gives out of the
        aggregate's hosts. The entry of clouds.yaml must be an admin's. Each line of the answer is a
        difference; with --dry-run that is all that happens. Without --aggregates, those that are
        marked are updated. With --named, a reservation may ask for a host by its name: add ...
        --host NAME.

        Example:
          python cmres.py resource sync chameleon --aggregate gpu --mode exclusive --dry-run
        """
        opened, target = self.clouds.open(cloud), f'the cloud {cloud}'
        there = {each.name: each for each in self.shares.ask(target, opened.aggregates)}
        for name in aggregates:
            if name not in there:
                raise NotFound(f"the cloud {cloud} has no aggregate '{name}'{nearest(name, there)}")
        chosen = [there[name] for name in aggregates or there if aggregates or there[name].mark]
        wanted = {} if not mode else {'mode': self.read_mode(mode)}
        wanted |= {'hold': seconds_of(hold)} if hold is not None else {}
        with self.writing(dry_run) as now:
            synced = [self.sync_one(cloud, each, wanted, named, force, now) for each in chosen]
        # outside the transaction: it is a call to the cloud
        for each, (name, _) in zip(chosen, synced):
            if each.mark != name and not dry_run:
                self.shares.ask(target, functools.partial(opened.mark, each.name, name))
        return [line for (name, lines), each in zip(synced, chosen) for line in lines + (
            [{'resource': name, 'what': 'mark', 'before': each.mark or None, 'after': name}]
            if each.mark != name else [])]

    def sync_one(self, cloud: str, aggregate: Aggregate, wanted: dict, named: bool | None,
                 force: bool, now: float) -> tuple[str, list[dict]]:
        """Makes or updates the resource of an aggregate; its name, a line a difference."""
        found = row('SELECT * FROM resource WHERE cloud = ? AND aggregate = ? AND removed IS NULL',
                    cloud, aggregate.name)
        before = found._asdict() if found else {'mode': '', 'named': ''}
        if wanted:
            self.refuse_idle((before | wanted)['mode'], before | wanted)
        new = self.synced(aggregate, before, named) | wanted
        name = found.name if found else calendar_name(aggregate.name)
        lines = [{'resource': name, 'what': field, 'before': in_brief(field, was),
                  'after': in_brief(field, value)} for field, value in new.items()
                 for was in [getattr(found, field, None)] if was != value]
        if not found:
            self.add_synced(cloud, aggregate.name, name, new, now)
        elif lines:
            change(Resource, found.id, **new)
            self.rehold_changes(self.look.resource_row(name), now)
            homeless = self.no_longer_fitting(self.look.resource_row(name), now)
            self.refuse_homeless(name, [] if force else
                                 homeless + self.without_host(found, new, now))
            fields = ', '.join(each['what'] for each in lines)
            self.journal(now, 'resource', f"synced the resource '{name}': {fields}")
        return name, lines

    def synced(self, aggregate: Aggregate, before: dict, named: bool | None) -> dict:
        """The columns of a resource that its aggregate tells."""
        total = stored(sum(aggregate.hosts.values(), NOTHING))
        new = {figure: each for figure, each in total.items() if figure != 'vms'}
        new |= {'hosts': json.dumps([*aggregate.hosts])}
        if named or named is None and before['named']:
            new['named'] = json.dumps({
                host: {'vcpus': each.vcpus, 'ram': each.ram} | dict(each.classes)
                for host, each in aggregate.hosts.items()})
        return new | ({'named': ''} if named is False else {})

    def add_synced(self, cloud: str, aggregate: str, name: str, new: dict, now: float) -> None:
        """Makes the resource of an aggregate."""
        self.policy.refuse_taken_resource(name)
        insert(Resource, **{'name': name, 'cell': '', 'cloud': cloud, 'region': '',
                            'aggregate': aggregate, 'vms': None, 'mode': '', 'named': '',
                            'added': int(now), 'hold': 0, 'approval': 0, 'no_show': 0} | new)
        self.journal(now, 'resource', f"added the resource '{name}' from the aggregate "
                     f"'{aggregate}'")

    @api('POST', '/resource/<name>/capacity', role=ADMIN, made='/maintenance/')
    def resource_capacity(self, name: Label, start: When, end: When, vms: Most = None,
                          vcpus: Most = None, ram: Most = None, classes: Classes = None,
                          reason: Text = '', then: Name = 'notify',
                          dry_run: bool = False) -> CapacityChangeAnswer:
        """Gives a resource another capacity from START to END: a loan of nodes, or less for a
        while.

        What is booked there and no longer fits is left and its owner told (--then notify), moved to
        another resource of the same cloud or to the next time that fits (move), or cancelled
        (cancel).

        Example:
          python cmres.py resource capacity demo --from 2027-03-01 --to 2027-03-08 --vms 4 --dry-run
        """
        if vms is vcpus is ram is None and not classes:
            raise Invalid('say how much there is: --vms, --vcpus, --ram or --classes')
        most = Amount(vms, vcpus, ram, tuple(sorted((classes or {}).items())))
        return self.change_capacity(name, start, end, most, reason or 'another capacity', then,
                                    dry_run)

    @api('POST', '/maintenance/', role=ADMIN, made='/maintenance/')
    def maintenance_add(self, resource: Label, start: When, end: When, reason: Text = '',
                        then: Name = 'notify', dry_run: bool = False) -> CapacityChangeAnswer:
        """Closes a resource from START to END; what is booked in it is left, moved or cancelled, as
        --then says.

        Nothing new is reserved in it, also on a resource whose capacity is unlimited.

        Example:
          python cmres.py maintenance add demo 2027-03-01T08:00 +4h --reason 'new disks' --then move
          --dry-run
        """
        return self.change_capacity(resource, start, end, None, reason or 'maintenance', then,
                                    dry_run)

    @api('GET', '/maintenance/')
    def maintenance_list(self, resource: Label = '') -> list[MaintenanceAnswer]:
        """Lists maintenances and other changes of capacity that are not over.

        Example:
          python cmres.py maintenance list
        """
        found = rows('SELECT c.id, s.name AS resource, c.start, c.end, c.vms, c.vcpus, c.ram, '
                     'c.classes, c.reason FROM capacity c JOIN resource s ON s.id = c.resource_id '
                     'WHERE c.removed IS NULL AND c.end > ? '
                     f"{'AND s.name = ?' if resource else ''} ORDER BY c.start", int(self.clock()),
                     *([resource] if resource else []))
        lines = [public(each) for each in found]
        for line in lines:
            line['classes'].pop(CLOSED, None)
        return lines

    @api('DELETE', '/maintenance/<id>', role=ADMIN)
    def maintenance_delete(self, id: int, dry_run: bool = False) -> CalledOffAnswer:
        """Calls off a maintenance or another change of capacity.

        Example:
          python cmres.py maintenance delete 1
        """
        with self.writing(dry_run) as now:
            found = row('SELECT * FROM capacity WHERE id = ? AND removed IS NULL', id)
            if not found:
                raise NotFound(f'there is no maintenance {id}')
            self.bookings.hold_capacity(found.resource_id, found.start, found.end,
                                        NOTHING - amount_of(found, 'held_'))
            change(Capacity, id, removed=int(now))
            self.let_start(found.resource_id, now)
            self.journal(now, 'resource', f'called off {found.reason} {id}')
            return {'id': id, 'reason': found.reason}

    def change_capacity(self, name: str, start, end, most: Amount | None, reason: str, then: str,
                        dry_run: bool) -> dict:
        """Gives a resource another capacity for a while; without `most`, none."""
        refuse_unknown_word('then', then, THEN)
        with self.writing(dry_run) as now:
            place = self.look.resource_row(name)
            begin, until = self.resolve(start, end)
            if until <= now:
                raise Invalid(f'the end {to_plain(instant(until))} is not in the future')
            classes = (CLOSED, *capacity(place).names)
            most = most or Amount(0, 0, 0, tuple((each, 0) for each in classes))
            held = self.difference(place, most)
            if held == NOTHING:
                raise Conflict(f"'{name}' has no limit that this would change; set one with: "
                               f'resource update {name} --vms N')
            self.bookings.hold_capacity(place.id, begin, until, held)
            id = insert(Capacity, resource=place.id, start=begin, end=until, **stored(most),
                        **stored(held, 'held_'), reason=reason, added=int(now), removed=None)
            first, last = self.config.told_time(begin), self.config.told_time(until)
            why = f"{reason} on {name} from {first} to {last}"
            hit = [self.make_room(each, why, then, now)
                   for each in self.homeless(place, max(begin, int(now)), until)]
            self.journal(now, 'resource', why)
            return {'id': id, 'resource': name, 'start': instant(begin), 'end': instant(until),
                    'reason': reason, 'hit': hit}

    def difference(self, place, most: Amount) -> Amount:
        """What must be held for another capacity; an unlimited figure stays so."""
        always, told = capacity(place), dict(most.classes)
        return Amount(*(0 if each is None or wanted in (None, UNLIMITED) else each - wanted
                        for each, wanted in zip(always[:3], most)),
                      (*(((CLOSED, 1),) if CLOSED in told else ()),
                       *((name, each - told.get(name, each)) for name, each in always.classes
                         if told.get(name, each) not in (UNLIMITED, each))))

    def rehold_changes(self, place, now: float) -> None:
        """Lets changes of capacity be what they were meant to be, after that has changed."""
        call_waiting(place.id)
        for each in rows('SELECT * FROM capacity WHERE resource_id = ? AND removed IS NULL AND '
                         '"end" > ?', place.id, int(now)):
            held = self.difference(place, amount_of(each))
            self.bookings.hold_capacity(place.id, each.start, each.end,
                                        held - amount_of(each, 'held_'))
            change(Capacity, each.id, **stored(held, 'held_'))
        self.let_start(place.id, now)

    def make_room(self, found, why: str, then: str, now: float) -> dict:
        """Moves or cancels an occurrence that has no room any more, or tells its owner."""
        line = some_of_public(found, *WHOSE)
        if then == 'cancel':
            self.admission.cancel([found], now, why)
            return line | {'outcome': 'cancelled'}
        place = self.moved_elsewhere(found, now) if then == 'move' else None
        outcome = (f'moved to {place[0]} from {format_time(instant(place[1]), self.config.zone)}'
                   if place else 'left')
        later = '' if place else ', and VMs that do not run yet start when that is over'
        self.tell(now, 'maintenance', f'{why}; it is {outcome}{later}', found, found.id)
        return line | {'outcome': outcome}

    def moved_elsewhere(self, found, now: float) -> tuple[str, int] | None:
        """Moves what has not begun elsewhere in its cloud, else to later: where it is now."""
        if now >= found.held_from or found.server:
            return None
        here = resource_of(found.resource_id, removed=True)
        others = [each for each in self.look.places() if each.cloud == here.cloud
                  and each.id != here.id
                  and not found.host and not each.approval and each.mode == here.mode]
        wish = self.wishes.carried_on(found)
        for place in others:
            if self.moved_to(found, wish._replace(resource=place), now):
                return place.name, found.start
        with self.bookings.as_if_without(found):
            need = found.held_until - found.held_from
            first = next((int(first) for first, last in free_windows(
                here, amount_of(found), found.held_from, LAST.timestamp()) if last - first >= need),
                         None)
        start = found.start if first is None else first + found.lead
        later = wish._replace(resource=here, start=start, end=start + found.end - found.start)
        if first is not None and self.moved_to(found, later, now):
            return here.name, start
        return None

    def moved_to(self, found, wish: Wish, now: float) -> bool:
        """Moves an occurrence to where it is wished to be, if every rule lets it."""
        deal = Deal('maintenance', wish, [change_to(
            found, wish._replace(stretches=[]), now, found.slot, told=0,
            altered=bool(found.repeats))], found, stretches=None if found.repeats else [])
        try:
            with Attempt():
                self.bookings.commit(deal, now)
                self.bookings.drop_proposals(found.reservation)
                return True
        except Conflict:
            return False

    def refuse_homeless(self, name: str, found: list[dict]) -> None:
        """Refuses a change of a resource after which some occurrences would not fit."""
        if found:
            raise Conflict(
                f"{len(found)} occurrences on '{name}' would no longer fit; --force does "
                           'it all the same and cancels nothing', occurrences=found)

    def without_host(self, place, new: dict, now: float) -> list[dict]:
        """What is reserved on hosts that a resource has no more, or no more by their names."""
        left = json.loads(new.get('named', place.named) or '{}')
        found = self.look.search([('o.resource_id = ?', place.id), ("r.host <> ''", None),
                                  (NOT_OVER, None), ('o.held_until > ?', int(now))], limit=1000)
        return [public(each) for each in found if each.host not in left]

    def no_longer_fitting(self, place, now: float) -> list[dict]:
        """The occurrences for which there is no room any more, as answers show them."""
        return in_lines(self.homeless(place, int(now), int(LAST.timestamp()))[:1000])

    def homeless(self, place, begin: int, until: int) -> list:
        """Where more is held than there is, as many of the latest added as must go."""
        return self.look.in_order(self.must_go(place, begin, until))

    def must_go(self, place, begin: int, until: int) -> list[int]:
        """The ids of those."""
        most = capacity(place)
        levels = dict(steps(place.id, begin, until, most.names))
        if all(held.within(most) for held in levels.values()):
            return []
        held = rows('SELECT id, resource_id, held_from, held_until, vms, vcpus, ram, classes FROM '
                    'occurrence WHERE resource_id = ? AND due IS NOT NULL AND start < ? + '
                    f'{LONGEST_LEAD} AND held_until > ? AND held_from < ? AND held_until > '
                    'held_from ORDER BY +id DESC', place.id, until, begin, until)
        # Between two cuts the same occurrences hold, so that what one of them gives back is all of
        # it there.
        cuts = sorted({*levels, *(min(max(at, begin), until) for each in held for at in each[2:4])}
                      - {until})
        there = list(itertools.accumulate((levels.get(at)
                                           for at in cuts), lambda before, after: after or before))
        found = []
        for each in held:
            touched = range(bisect_left(cuts, max(each.held_from, begin)),
                            bisect_left(cuts, each.held_until))
            if not all(there[n].within(most) for n in touched):
                found.append(each.id)
                for n in touched:
                    there[n] -= amount_of(each)
        return found

    def waits_for(self, place, now: float) -> tuple[str, int, set | None]:
        """Why VMs of a resource can't start now, until when, and of which occurrences; None: all.

        What is closed starts nothing. Where there is less than is booked, the last added waits.
        """
        changes = rows('SELECT reason, "end", coalesce(max(vms, vcpus, ram), 1) AS left '
                       'FROM capacity WHERE resource_id = ? AND removed IS NULL AND start <= ? '
                       'AND "end" > ? ORDER BY left, "end" DESC', place.id, int(now), int(now))
        if changes and changes[0].left == 0:
            until = self.config.told_time(changes[0].end)
            return f"{changes[0].reason} on '{place.name}' until {until}", changes[0].end, None
        why = f"'{place.name}' has less than is reserved now; what was reserved earlier comes first"
        return why, min((each.end for each in changes), default=int(now) + 86400), set(
            self.must_go(place, int(now), int(now) + 1))

    def let_start(self, resource: int, now: float) -> None:
        """Lets start at once what has waited for a resource to have as much as is booked."""
        if rehearsal.on:
            return
        run("UPDATE server SET due = ? WHERE due > ? AND goal = 'up' "
            "AND (state = 'planned' OR ready IS NULL OR borrowed) AND occurrence_id IN "
            '(SELECT id FROM occurrence WHERE resource_id = ? AND due IS NOT NULL '
            f'AND start <= ? + {LONGEST_LEAD} AND held_from <= ?)', now, now, resource, int(now),
            int(now))

    @api('GET', '/check', role=ADMIN)
    def check(self) -> CheckAnswer:
        """Rebuilds the usage from the occurrences and compares it with what is kept; fails on any
        difference.

        Example:
          python cmres.py check
        """
        differences, steps_seen = [], 0
        with db.atomic('DEFERRED'):  # one snapshot of all tables; nobody waits for it
            for place in self.progress(rows('SELECT id, name FROM resource')):
                kept = {(track, at): tuple(held) for track, at, *held in run(
                    'SELECT track, at, vms, vcpus, ram FROM step WHERE resource_id = ?', place.id)}
                right = dict(held_steps(place.id))
                steps_seen += len(right)
                wrong = sorted(step for step in kept.keys() | right.keys()
                               if kept.get(step) != right.get(step))
                differences += [{'resource': place.name, 'at': instant(step[1]),
                                 'kept': kept.get(step),
                                 'right': right.get(step)} for step in wrong]
        if differences:
            raise Error(f'the usage differs from the occurrences at {len(differences)} instants, '
                        f"first on {differences[0]['resource']} at {differences[0]['at']}",
                        differences=differences[:100])
        return {'steps': steps_seen, 'differences': 0}


# Claims ######################################################################
#
# What Nova's scheduler asks of a server that somebody boots: on which resources it may, and why.


class Claims(Operations):
    """What may be booked through Nova."""

    @api('POST', '/claim/', role=ADMIN)
    def claim(self, server: Name, resources: Names, project: Name, user: Name = '',
              vcpus: Figure = 0, ram: Figure = 0, classes: Classes = None, label: Name = '',
              dry_run: bool = False) -> list[ClaimAnswer]:
        """Tells on which resources a server may boot, why, and counts it there: what Nova's
        scheduler asks.

        Who has an active reservation passes as long as fewer machines, vcpus and ram were booted
        than reserved. Others pass on a shared resource as far as it is free, and stays so for its
        hold time. Asking again for the same server counts it once.

        Example:
          python cmres.py claim 7c1f gpu biology --vcpus 4 --ram 8192
        """
        need = Amount(1, vcpus, ram,
                      tuple(sorted(each for each in (classes or {}).items() if each[1] > 0)))
        projects, users = self.names_of(project), self.names_of(user)
        with self.writing(dry_run) as now:
            return [{'resource': name} | self.claim_on(name, server, projects, users, need, label,
                                                       project, user, now) for name in resources]

    def names_of(self, identity: str) -> list[str]:
        """What cmres calls whom OpenStack knows under an id."""
        known = self.config.read_again().identities
        return [name for name, id in known.items() if id == identity] or [identity]

    def claim_on(self, name: str, server: str, projects: list[str], users: list[str], need: Amount,
                 label: str, project: str, user: str, now: float) -> dict:
        """Whether a server may boot on a resource, why, on which hosts; if so, it counts."""
        place = row('SELECT * FROM resource WHERE name = ? AND removed IS NULL', name)
        if not place or not place.mode:
            why = f"'{name}' is open to everybody" if place else f"there is no resource '{name}'"
            return {'passes': bool(place), 'why': why, 'hosts': None}
        found, why = self.may_boot(place, server, projects, users, need, label, now)
        walks_in = False
        if not found and not label and place.mode == 'shared':
            walks_in, why = self.walk_in(place, server, need, now), (
                f"'{name}' is not free for {format_duration(place.hold)}")
        hosts = self.hosts_for(place, found, now) if found or walks_in else None
        if hosts == []:
            why = f"'{found.host}' is no host of '{name}' any more" if found and found.host else (
                f"all hosts of '{name}' are reserved by their names until then")
        if not (found or walks_in) or hosts == []:
            return {'passes': False, 'why': why, 'hosts': None}
        classes = stored(need)['classes']
        if not rehearsal.on:
            run('INSERT INTO claim (resource_id, occurrence, server, project, user, vcpus, ram, '
                'classes, at, due) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (resource_id, '
                'server) DO UPDATE SET occurrence = excluded.occurrence, vcpus = excluded.vcpus, '
                'ram = excluded.ram, classes = excluded.classes, due = excluded.due', place.id,
                found.id if found else None, server, project, user, need.vcpus, need.ram, classes,
                now, now + self.config.settle)
        return {'passes': True, 'why': 'reserved' if found else 'free', 'hosts': hosts}

    def hosts_for(self, place, found, now: float) -> list[str] | None:
        """The hosts on which a server may boot, None: any; a named one is its owner's alone."""
        if found and found.host:
            return [host for host in json.loads(place.hosts) if host == found.host]
        if not place.named:
            return None
        until = found.end if found else now + max(place.hold, 1)
        taken = {each.host for each in rows(
            'SELECT r.host FROM occurrence o JOIN reservation r ON r.id = o.reservation_id WHERE '
            "o.resource_id = ? AND o.due IS NOT NULL AND r.host <> '' AND o.start < ? + "
            f'{LONGEST_LEAD} AND o.held_from < ? AND o.held_until > ? AND o.held_until > '
            'o.held_from', place.id, until, until, now)}
        return [host for host in json.loads(place.hosts) if host not in taken] if taken else None

    def may_boot(self, place, server: str, projects: list[str], users: list[str], need: Amount,
                 label: str, now: float) -> tuple[Any, str]:
        """The occurrence on which a server may boot, or None and why there is none."""
        named = f'{shown(label)} ' if label else ''
        why = f"no reservation {named}of the project {projects[0]} is active on '{place.name}'"
        mine = self.booked_by(projects, label, place, 0, now)
        for each in mine:
            if now >= each.end:
                why = f"'{each.label}' has ended at {instant(each.end)}"
            elif each.personal and each.user not in users:
                why = f"'{each.label}' is for {each.user} alone"
            elif self.has_left(place, each, server, need, now):
                return each, ''
            else:
                why = (f"'{each.label}' has {each.vms} vms, {each.vcpus} vcpus and {each.ram} MiB, "
                       'and they are in use')
        for each in [] if mine else self.booked_by(projects, label, place, now, now + 86400)[:1]:
            why = f"'{each.label}' begins at {instant(each.held_from)}"
        return None, why

    def booked_by(self, projects: list[str], label: str, place, after: float, until: float) -> list:
        """What projects have booked on a resource that is held from (after, until] on."""
        marks = ', '.join('?' * len(projects))
        # CROSS JOIN and +: SQLite is to begin with what is held there then, not with all that
        # anybody has reserved.
        return rows('SELECT o.*, r.label, r.user, r.personal, r.flavor, r.host FROM occurrence o '
                    'CROSS JOIN reservation r ON r.id = o.reservation_id WHERE o.resource_id = ? '
                    f'AND o.due IS NOT NULL AND o.start > ? AND o.start <= ? + {LONGEST_LEAD} AND '
                    'o.held_from > ? AND o.held_from <= ? AND o.cancelled IS NULL AND r.waiting IS '
                    'NULL AND r.pending IS NULL AND r.project IN '
                    f"({marks}){' AND ? IN (r.label, r.request)' if label else ''} ORDER BY "
                    '+o.start',
                    place.id, after, until, after, until, *projects, *([label] if label else []))

    def has_left(self, place, found, server: str, need: Amount, now: float) -> bool:
        """Whether of what an occurrence has reserved there is still enough for one more server."""
        taken, reserved = self.claimed('occurrence = ?', found.id, server) + need, amount_of(found)
        if found.flavor or found.host:
            return taken.within(reserved._replace(classes=tuple((name,
                                                                 dict(reserved.classes).get(name,
                                                                                            0))
                                                                for name in taken.names)))
        # What was reserved without a flavor holds no vcpus: its machines take what is free of them.
        return taken.vms <= reserved.vms and self.walk_in(place, server, need._replace(vms=0), now)

    def claimed(self, condition: str, value, server: str) -> Amount:
        """What other servers than this one have claimed and still use."""
        where = f'FROM claim WHERE {condition} AND due IS NOT NULL AND server <> ?'
        total = Amount(*run(f'SELECT count(*), coalesce(sum(vcpus), 0), coalesce(sum(ram), 0) '
                            f'{where}', value, server).fetchone())
        for (classes,) in run(f"SELECT classes {where} AND classes <> ''", value,
                              server).fetchall():
            total += Amount(classes=tuple(sorted(json.loads(classes).items())))
        return total

    def walk_in(self, place, server: str, need: Amount, now: float) -> bool:
        """Whether there is room from now for the hold time of a resource."""
        others = self.claimed('resource_id = ? AND occurrence IS NULL', place.id, server)
        for each in rows('SELECT o.id, o.cancelled, o."end", o.vms, o.vcpus, o.ram, o.classes FROM '
                         'occurrence o WHERE o.id IN (SELECT occurrence FROM claim WHERE '
                         'resource_id = ? AND due IS NOT NULL)', place.id):
            held = NOTHING if each.cancelled is not None or each.end <= now else amount_of(each)
            # what is there and nobody holds
            beyond = self.claimed('occurrence = ?', each.id, server) - held
            others += Amount(*(max(figure, 0) for figure in beyond[:3]),
                             tuple(one for one in beyond.classes if one[1] > 0))
        used = peak(place.id, now, now + max(place.hold, 1), need.names)
        return (used + others + need).within(capacity(place))


# Calendars ###################################################################
#
# Calendars that make reservations, once or again and again, and calendars that show them.


#: What a feed reads: no user data, and of a long description its beginning.
FOR_FEEDS = LISTING.replace('r.user_data,', "'' AS user_data,").replace(
    'r.description,', "iif(length(r.description) > 500, substr(r.description, 1, 497) || '...', "
    'r.description) AS description,')


def repeats(booking: Booking) -> bool:
    """Whether an event may have more than one occurrence."""
    return any(not stretch.single for stretch in booking.stretches)


class Calendars(Operations):
    """Imports, subscriptions and feeds."""

    @api('POST', '/reservation/import')
    def import_(self, file: Ics, resource: Label = '', flavor: Name = '', image: Name = '',
                network: Name = '', key: Name = '', vms: Count = 1, at_end: Name = '',
                notify: Names = (), on_conflict: Clash = 'refuse', tz: Zone = '', user: Name = '',
                project: Name = '', dry_run: bool = False, asked: dict = None) -> ImportAnswer:
        """Reserves what the events of an iCalendar file ask for, each event on its own.

        An event asks with `2 x m1.small` in the first line of its description or in its place, with
        `#vm 2 x m1.small` in its title or description, or with CATEGORIES:VM and X-VM-COUNT,
        X-VM-FLAVOR, X-VM-IMAGE; an image and a resource may follow: `2 x m1.small cirros on demo`.
        The options here are for what it doesn't say. Events that ask for nothing are left alone,
        whatever they are; what is refused is refused alone. Importing again changes only what
        changed; nothing is cancelled because it is not in the file any more.

        Example:
          python cmres.py import class.ics --resource demo --image cirros --tz Europe/Paris
          --dry-run
        """
        return self.take_calendar(file, asked, dry_run)

    def take_calendar(self, text: str, said: dict, dry_run: bool, subscription=None) -> dict:
        """Reserves what a calendar asks for, and of a subscription cancels what is gone."""
        zone, here = read_zone(said['tz'] or self.config.timezone), self.here.now
        owner, entries = self.owner(said), read_calendar(text, 'the calendar')
        groups = by_uid(wishful(entries))
        wanted = bookings(groups, zone, here, here + timedelta(days=self.config.horizon),
                          Want(*(said[name] for name in Want._fields)))
        wanted = self.without_lookalikes(wanted, said, owner, subscription)
        ignored = len({each.uid for each in entries} | {*groups}) - len(wanted)
        lines = self.read_bookings(wanted, said, zone)
        before = []
        if not dry_run and not self.live_of(subscription, self.clock()):
            before = self.take_in_pieces(lines, owner, subscription)
        try:
            with self.writing(dry_run) as now:
                done = before + self.take_bookings(wanted, lines, owner, subscription, now)
                if subscription:
                    self.tell_refused(subscription, done, now)
        except Held as held:
            with self.writing(dry_run) as now:
                if not subscription.held:  # it is told once
                    self.journal(now, 'held', str(held), None, json.loads(subscription.notify))
            return {'held': str(held), 'events': [], 'ignored': ignored}
        return {'events': sorted(done, key=lambda each: each['uid']), 'ignored': ignored}

    def without_lookalikes(self, wanted: list[Booking], said: dict, owner: tuple[str, str],
                           subscription) -> list[Booking]:
        """The bookings without lookalikes: no cloud has a flavor as that of `3 x pizza`.

        What is booked is one, whatever became of its flavor; and so is all while a cloud is silent.
        """
        if all(not each.guess for each in wanted):
            return wanted
        booked = {each.uid for each in rows(
            'SELECT uid FROM reservation WHERE uid IN (SELECT value FROM json_each(?)) '
            'AND user = ? AND project = ? AND subscription IS ? AND over > ?',
            json.dumps([each.uid for each in wanted if each.guess]),
            *owner, subscription.id if subscription else None, int(self.clock()))}
        try:
            accounts = [self.clouds.account(cloud, owner[1]) for cloud in self.clouds_of(said)]
            names = {name for account in accounts for name in self.shares.ask(
                f'the cloud {account}', lambda: self.clouds.open(account).names('flavor'))}
        except CloudError:
            return wanted
        close = {guess for guess in {each.guess for each in wanted}
                 if not guess or not names or difflib.get_close_matches(guess, names, 1)}
        return [each for each in wanted if each.guess in close or each.uid in booked]

    def clouds_of(self, said: dict) -> list[str]:
        """The clouds on which a calendar may book: that of its resource, else those of all."""
        named = row('SELECT cloud FROM resource WHERE name = ? AND removed IS NULL',
                    said['resource'])
        if named and named.cloud:
            return [named.cloud]
        return [each.cloud for each in rows(
            "SELECT DISTINCT cloud FROM resource WHERE cloud <> '' AND removed IS NULL")]

    def take_in_pieces(self, lines: deque, owner: tuple[str, str], subscription) -> list[dict]:
        """What became of each event, where none can make anything go; others can write between."""
        done = []
        while lines:
            self.shares.breathe()
            with self.writing() as now:
                self.refuse_unsubscribed(subscription)
                done += [self.take_booking(*line, owner, subscription, now)
                         for line in some_of(lines)]
        return done

    def refuse_unsubscribed(self, subscription) -> None:
        if subscription and not row('SELECT id FROM subscription WHERE id = ? AND due IS NOT NULL',
                                    subscription.id):
            raise Conflict('it was unsubscribed meanwhile')

    def take_bookings(self, wanted: list[Booking], lines: Iterable[tuple], owner: tuple[str, str],
                      subscription, now: float) -> list[dict]:
        """What became of each event; Held where of a subscription more than half would go."""
        self.refuse_unsubscribed(subscription)
        had = self.live_of(subscription, now)
        done = [self.take_booking(*line, owner, subscription, now) for line in lines]
        done += self.drop_missing(wanted, subscription, now)
        self.ask_before_most_goes(subscription, had, now)
        return done

    def read_bookings(self, wanted: list[Booking], said: dict, zone: ZoneInfo) -> deque[tuple]:
        """Bookings with their wishes, or with the errors that refuse them; what is plain first."""
        lines, left, budget = {}, 10 * MOST_OCCURRENCES, Budget()
        for booking in self.progress(sorted(wanted, key=repeats)):
            self.shares.breathe()
            try:
                with budget.event(repeats(booking)):
                    wish, coming = self.read_booking(booking, said, zone)
                if len(coming) > left:
                    raise Invalid(f'its calendar asks for more than {10 * MOST_OCCURRENCES} '
                                  'occurrences until the horizon; put it into one of its own')
                left -= len(coming)
                lines[booking.uid] = booking, wish, None
            except Error as error:
                lines[booking.uid] = booking, None, error
        return deque(lines[booking.uid] for booking in wanted)

    def read_booking(self, booking: Booking, said: dict,
                     zone: ZoneInfo) -> tuple[Wish | None, list[Slot]]:
        """The wish of a booking, and what it wants until the horizon; Error if it is refused."""
        want = booking.want
        if booking.error:
            raise BadCalendar(booking.error)
        now = self.clock()
        coming = all_slots(booking.stretches, now, self.series.horizon(booking.stretches, now))
        if booking.cancelled or not coming:
            return None, []
        asked = said | want._asdict() | {
            'label': calendar_name(booking.summary), 'start': instant(coming[0].start),
            'end': instant(coming[0].end), 'security_groups': (), 'user_data': '', 'metadata': None,
            'server': '', 'personal': False, 'lead': None, 'description': booking.summary[:1000],
            'repeat': booking.stretches[0].rule, 'late': True}
        if not want.resource:
            raise Invalid(f"no resource is named; write `{want.vms} x {want.flavor or 'm1.small'} "
                          'on RESOURCE`, or say --resource')
        wish = self.wishes.read_wish(asked, changes=())
        stretches = [stretch._replace(resource=wish.resource.id) for stretch in booking.stretches]
        return wish._replace(stretches=stretches, tz=stretches[0].zone), coming

    def take_booking(self, booking: Booking, wish: Wish | None, error: Error | None,
                     owner: tuple[str, str], subscription, now: float) -> dict:
        """What became of an event: one of `booked`, `changed`, `refused` and so on."""
        line = {'uid': booking.uid, 'summary': booking.summary[:200]}
        if error:
            return line | {'outcome': 'refused', 'why': booking.why(error)}
        source = subscription.id if subscription else None
        known = row('SELECT * FROM reservation WHERE uid = ? AND project = ? AND user = ? AND '
                    'subscription IS ? ORDER BY id DESC LIMIT 1', booking.uid, *owner[::-1], source)
        live = known and known.over > now
        if wish is None:
            stops = booking.cancelled and not subscription  # else what runs goes on
            gone = ([each for each in self.look.live(self.look.next_of(known.id)) if stops
                     or not self.look.begun(each)] if live else [])
            if gone:
                self.admission.cancel(gone, now, 'cancelled in the calendar', ends=True)
                return line | {'outcome': 'cancelled', 'label': known.label}
            return line | {'outcome': 'past' if not booking.cancelled else 'cancelled'}
        asked = (name for name in STORED if name not in ('label', 'trusted'))
        origin = hashed(repr((booking.digest, wish.columns(*asked))))
        if known and known.origin == origin and (live or subscription):
            # it is spelled out, further than before
            if live and known.series != stored_stretches(wish.stretches):
                change(Reservation, known.id, series=stored_stretches(wish.stretches))
                self.series.refresh(known.id, now)
            return line | {'outcome': 'unchanged' if live else 'left out', 'label': known.label} | (
                {} if live else {'why': 'it was cancelled here'})
        try:
            with Attempt():
                return line | self.book_event(booking, wish, known if live else None, origin,
                                              source, now)
        except Error as refusal:
            return line | {'outcome': 'refused', 'why': booking.why(refusal)}

    def book_event(self, booking: Booking, wish: Wish, known, origin: str, source: int | None,
                   now: float) -> dict:
        """Books an event, or makes of its reservation what the event says now."""
        if known:
            head = self.look.next_of(known.id)
            wish = wish._replace(label=known.label)
            change(Reservation, known.id, origin=origin)
            made = self.bookings.commit(self.admission.edit(head, wish, ['calendar'], now,
                                                            'calendar'), now)
            if not made:
                return {'label': wish.label, 'outcome': 'pending',
                        'why': 'an admin must approve the change'}
            done = made.done
            self.journal(now, 'updated', 'changed in the calendar', known.id, wish.notify,
                         NONE_OF_THEM)
        else:
            wish = wish._replace(label=self.free_label(wish, now))
            _, done = self.admission.book(wish, now, uid=booking.uid, subscription=source,
                                          origin=origin)
        left_out = [each for each in done if each['outcome'] in ('left out', 'shifted')]
        return {'label': wish.label, 'outcome': 'changed' if known else 'booked',
                'start': instant(wish.start), 'vms': wish.vms, 'flavor': wish.flavor,
                'count': len(done)} | ({'occurrences': left_out} if left_out else {})

    def free_label(self, wish: Wish, now: float) -> str:
        """The label of a wish, with a number behind it if somebody has it."""
        def taken(number: int) -> bool:
            label = f'{wish.label}-{number}' if number > 1 else wish.label
            return taken_label(wish.project, label, now)
        last = free = 1
        while taken(free):
            last, free = free, 2 * free
        while free - last > 1:
            middle = (last + free) // 2
            last, free = (middle, free) if taken(middle) else (last, middle)
        return f'{wish.label}-{free}' if free > 1 else wish.label

    @api('GET', '/calendar/')
    def calendar_list(self) -> list[CalendarAnswer]:
        """Lists calendars: feeds that show reservations, and subscriptions that make them; no
        secret of theirs.

        Example:
          python cmres.py calendar list
        """
        own = '' if self.actor.role == ADMIN else 'AND user = ? AND project = ?'
        who = () if self.actor.role == ADMIN else self.actor[:2]
        feeds = rows("SELECT id, 'feed' AS kind, user, project, coalesce("
                     "(SELECT name FROM resource s WHERE s.id = resource_id), "
                     "iif(whole_project, 'the project', 'the user')) "
                     f'AS shows, added FROM feed WHERE revoked IS NULL {own} ORDER BY id', *who)
        subscribed = rows(f"SELECT id, 'subscription' AS kind, user, project, url, added, polled, "
                          f"fault, held "
                          f'FROM subscription WHERE due IS NOT NULL {own} ORDER BY id', *who)
        return [public(each) for each in feeds] + [
            {name: value for name, value in public(each).items() if name != 'url'} |
            {'shows': urlsplit(each.url).hostname} for each in subscribed]

    @api('POST', '/calendar/feed', role=READER, made='/calendar/')
    def calendar_feed(self, resource: Label = '', whole_project: bool = False, user: Name = '',
                      project: Name = '', dry_run: bool = False) -> FeedAnswer:
        """Makes an address at which any calendar program can subscribe to your reservations, and
        prints it.

        The address is a secret and is shown only now; `calendar revoke` makes it worthless. With
        --resource it shows all of that resource, what is others' as busy only.

        Example:
          python cmres.py calendar feed --resource demo
        """
        user, project = self.owner({'user': user, 'project': project})
        secret = secrets.token_urlsafe(24)
        with self.writing(dry_run) as now:
            self.refuse_one_more('feeds', user, project)
            insert(Feed, user=user, project=project, whole_project=whole_project,
                   resource=self.look.id_of(resource), hash=hashed(secret), added=int(now),
                   revoked=None)
            self.journal(now, 'calendar', f'made a feed for {user} in {project}')
        name = quote(resource or (project if whole_project else user), safe='')
        served = f'http://{self.config.host}:{self.config.port}'
        return {'user': user, 'project': project} if dry_run else {
            'feed': f"{self.config.address.rstrip('/') or served}/calendar/{secret}/{name}.ics"}

    @api('DELETE', '/calendar/<id>')
    def calendar_revoke(self, id: int, dry_run: bool = False) -> CalendarAnswer:
        """Makes the address of a feed worthless from now on.

        Example:
          python cmres.py calendar revoke 1
        """
        with self.writing(dry_run) as now:
            found = self.own_calendar('feed', 'revoked IS NULL', id)
            change(Feed, id, revoked=int(now))
            self.journal(now, 'calendar', f'revoked feed {id}')
            return {'id': id, 'kind': 'feed', 'user': found.user, 'project': found.project,
                    'revoked': instant(int(now))}

    @api('POST', '/calendar/subscription/', made='/calendar/')
    def calendar_subscribe(self, url: Url, resource: Label = '', flavor: Name = '',
                           image: Name = '', network: Name = '', key: Name = '', vms: Count = 1,
                           at_end: Name = '', notify: Names = (), on_conflict: Clash = 'refuse',
                           tz: Zone = '', user: Name = '', project: Name = '',
                           dry_run: bool = False, asked: dict = None) -> CalendarAnswer:
        """Lets a calendar of yours book machines: what appears in it is reserved, what moves moves,
        what goes goes.

        It is looked at every five minutes (`calendar_poll`). Its events ask for machines as those
        of `import` do. Nothing is cancelled because it could not be read; before more than half
        would go, or all of
        it, cmres asks: it does nothing until `calendar confirm`. What runs goes on to its end.

        Example:
          python cmres.py calendar subscribe https://calendar.example.org/secret/eva.ics --resource
          demo
        """
        said = {name: value for name, value in asked.items() if name not in ('url', 'dry_run')}
        said['user'], said['project'] = self.owner(said)
        said['resource'] = self.look.id_of(resource) or 0
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or '', parts.port or 443
        except ValueError:
            raise Invalid('url: its host or port is none; write one such as '
                          'https://example.org/eva.ics') from None
        try:
            self.shares.ask(f'the host {host}', lambda: allowed_address(self.config, host, port))
        except (OSError, ValueError) as error:
            raise Invalid(f'url: {error}') from None
        with self.writing(dry_run) as now:
            if row('SELECT id FROM subscription WHERE url = ? AND user = ? AND project = ? AND due '
                   'IS NOT NULL', url, said['user'], said['project']):
                raise Conflict('you are subscribed to this calendar already; `calendar list` '
                               'shows it')
            self.refuse_one_more('subscriptions', said['user'], said['project'])
            id = insert(Subscription, user=said['user'], project=said['project'], url=url,
                        defaults=json.dumps(said), notify=json.dumps([*notify]), added=int(now),
                        due=now, etag='', modified='', fault='', held='', refused='{}',
                        confirmed=False, tries=0)
            self.journal(now, 'calendar', f'subscribed to a calendar at {parts.hostname}')
        return {'id': id, 'kind': 'subscription', 'user': said['user'], 'project': said['project'],
                'shows': parts.hostname}

    @api('DELETE', '/calendar/subscription/<id>')
    def calendar_unsubscribe(self, id: int, dry_run: bool = False) -> CalendarAnswer:
        """Stops looking at a calendar; what it has booked stays.

        Example:
          python cmres.py calendar unsubscribe 1
        """
        return self.changed_subscription(id, dry_run, 'unsubscribed from calendar', due=None)

    @api('POST', '/calendar/subscription/<id>/confirm')
    def calendar_confirm(self, id: int, dry_run: bool = False) -> CalendarAnswer:
        """Lets a calendar cancel what it asked about: most of what it had booked.

        Example:
          python cmres.py calendar confirm 1
        """
        if not self.own_calendar('subscription', 'due IS NOT NULL', id).held:
            raise Conflict(f'the calendar {id} asks for nothing that would need a word')
        return self.changed_subscription(id, dry_run, 'confirmed calendar', confirmed=True, etag='',
                                         modified='', due=self.clock())

    def changed_subscription(self, id: int, dry_run: bool, what: str, **values) -> dict:
        """Changes a subscription of one's own, and tells which it was."""
        with self.writing(dry_run) as now:
            found = self.own_calendar('subscription', 'due IS NOT NULL', id)
            change(Subscription, id, **values)
            self.journal(now, 'calendar', f'{what} {id}')
        return {'id': id, 'kind': 'subscription', 'user': found.user, 'project': found.project,
                'shows': urlsplit(found.url).hostname}

    def own_calendar(self, table: str, condition: str, id: int):
        """A feed or a subscription that is in force and one's own; NotFound if there is none."""
        found = row(f'SELECT * FROM {table} WHERE id = ? AND {condition}', id)
        if not found or self.actor.role != ADMIN and (found.user, found.project) != self.actor[:2]:
            raise NotFound(f'there is no {table} {id} that is in force')
        return found

    def poll(self, subscription) -> dict:
        """Looks at a subscribed calendar, and books what it asks; what to remember of it."""
        headers = {'If-None-Match': subscription.etag, 'If-Modified-Since': subscription.modified}
        # what is spelled out must go on
        if int(subscription.polled or 0) // 86400 != int(self.clock()) // 86400:
            headers = {}
        status, found, body = fetch(self.config, subscription.url,
                                    {name: value for name, value in headers.items() if value})
        if status == 304:
            return {}
        if status != 200:
            raise Unavailable(f'the answer was {status}')
        said = self.defaults_of(subscription)
        acting = self.acting(Actor(subscription.user, subscription.project, USER))
        answer = acting.take_calendar(body.decode('utf8', 'surrogateescape'), said, False,
                                      subscription)
        # What could not be done now is asked for again, also when the calendar is the same.
        open_end = (answer.get('held')
                    or any(each['outcome'] == 'refused' for each in answer['events']))
        kept = {'held': answer.get('held', ''),
                'etag': '' if open_end else found.get('etag', '')[:255],
                'modified': '' if open_end else found.get('last-modified', '')[:255]}
        return kept | ({} if answer.get('held') else {'confirmed': False})

    def defaults_of(self, subscription) -> dict:
        """What the events of a subscribed calendar don't say, its resource by its present name."""
        said = json.loads(subscription.defaults)
        found = row('SELECT name, removed FROM resource WHERE id = ?', said['resource'])
        if found and found.removed:
            raise NotFound(f"the resource '{found.name}' was removed; subscribe again with another "
                           '--resource')
        return said | {'resource': found.name if found else ''}

    def live_of(self, subscription, now: float) -> dict[int, int]:
        """How many occurrences to come a subscription has, of each reservation."""
        if not subscription:
            return {}
        return dict(run('SELECT r.id, count(*) FROM occurrence o JOIN reservation r '
                        'ON r.id = o.reservation_id WHERE r.subscription = ? '
                        'AND o.cancelled IS NULL AND o.start > ? GROUP BY 1',
                        subscription.id, int(now)).fetchall())

    def drop_missing(self, wanted: list[Booking], subscription, now: float) -> list[dict]:
        """Cancels what a subscription has booked and asks for no more; what runs goes on."""
        if not subscription:
            return []
        uids, done = {each.uid for each in wanted}, []
        for each in rows('SELECT id, uid, label FROM reservation '
                         'WHERE subscription = ? AND over > ?', subscription.id, int(now)):
            coming = [] if each.uid in uids else self.look.search([('r.id = ?', each.id),
                                                                   (NOT_OVER, None),
                                                                   ('o.held_from > ?', now)])
            if coming:
                self.admission.cancel(coming, now, 'gone from the calendar', ends=True)
                done.append({'uid': each.uid, 'summary': '', 'outcome': 'cancelled',
                             'label': each.label})
        return done

    def ask_before_most_goes(self, subscription, had: dict[int, int], now: float) -> None:
        """Raises Held where most of a calendar would go, and nobody has said so."""
        have, all_of_them = self.live_of(subscription, now), sum(had.values())
        gone = sum(max(number - have.get(id, 0), 0) for id, number in had.items())
        if subscription and not subscription.confirmed and 2 * gone > all_of_them:
            raise Held(f'{gone} of {all_of_them} occurrences to come would be cancelled, so '
                       f'nothing was done; say: calendar confirm {subscription.id}')

    def tell_refused(self, subscription, done: list[dict], now: float) -> None:
        """Tells, once each, what a calendar asks for in vain."""
        before = json.loads(subscription.refused)
        refused = {each['uid']: re.sub(r' \(line \d+\)', '', each['why'])[:500]  # which change
                   for each in done if each['outcome'] == 'refused'}
        new = [why for uid, why in refused.items() if before.get(uid) != why]
        if len(new) > MOST_TOLD:
            new[MOST_TOLD:] = [f'{len(new) - MOST_TOLD} more of its events are refused']
        for why in new:
            journal(self.config, now, self.actor.user, 'refused', f'your calendar: {why}', None,
                    json.loads(subscription.notify), project=self.actor.project)
        change(Subscription, subscription.id, refused=json.dumps(refused))

    def feed(self, secret: str) -> tuple[str, Any]:
        """The name and the row of the feed at a secret address; NotFound if there is none."""
        found = row('SELECT f.*, s.name AS resource FROM feed f LEFT JOIN resource s ON s.id = '
                    'f.resource_id WHERE hash = ? AND revoked IS NULL', hashed(secret))
        if not found:
            raise NotFound('there is no calendar at this address, or no longer')
        return (found.resource
                or f"{found.project if found.whole_project else found.user} on cmres", found)

    def feed_events(self, feed) -> tuple[list[Shown], float]:
        """What a feed shows, others' as busy only, and until when that holds."""
        found = self.look.page(*self.shown_in(feed), (), limit=MOST_SHOWN_BY_FEED + 1,
                               fields=FOR_FEEDS)
        servers: dict = defaultdict(list)
        for each in rows("SELECT occurrence_id, addresses FROM server WHERE occurrence_id IN "
                         "(SELECT value FROM json_each(?)) AND due IS NOT NULL AND goal = 'up'",
                         json.dumps([each.id for each in found])):
            servers[each.occurrence_id] += json.loads(each.addresses)
        now = self.clock()
        turns = [at for each in found for at in (each.held_from, each.start, each.end) if at > now]
        shown = [self.feed_event(each, feed, servers[each.id])
                 for each in found[:MOST_SHOWN_BY_FEED]
                 if each.project == feed.project or each.state not in ('cancelled', 'failed')]
        shown += [self.not_shown(each) for each in found[MOST_SHOWN_BY_FEED:]]
        return shown, min([now + 60, *turns])

    def not_shown(self, first) -> Shown:
        """What a feed says in the place of the first occurrence that is too many for it."""
        uid, words = f'more-{first.start}@{self.clouds.store}', 'more is reserved from here on'
        return Shown(uid, first.start, first.end, 0, first.start, words,
                     f'This calendar shows {MOST_SHOWN_BY_FEED} occurrences. See the others with: '
                     f'list', '', 'TENTATIVE')

    def shown_in(self, feed) -> tuple[list, list]:
        """The occurrences that a feed shows, as `page` takes them."""
        own = not feed.resource_id and not feed.whole_project
        asked = dict.fromkeys((*PLACE, 'resource'), '') | {
            'user': feed.user if own else '', 'project': '' if feed.resource_id else feed.project}
        filters, where = self.acting(Actor('', '', ADMIN)).look.filtered(asked)
        filters |= {'places': [feed.resource_id]} if feed.resource_id else {}
        begin = int(self.clock()) - MONTH
        return self.look.ways(filters, (), begin), [*where, ('o."end" > ?', begin)]

    def feed_digest(self, feed) -> str:
        """Changes whenever something that a feed shows does, for much less than the feed."""
        ids = [id for _, id in walk(self.clock(), *self.shown_in(feed), MOST_SHOWN_BY_FEED + 1)]
        return hashed(str(run('SELECT id, revision, revised FROM occurrence '
                              'WHERE id IN (SELECT value FROM json_each(?))',
                              json.dumps(ids)).fetchall()))

    def feed_event(self, found, feed, addresses: list[str]) -> Shown:
        """An occurrence as a feed shows it: one's own with all that helps, others' as busy."""
        uid = f'occurrence-{found.id}@{self.clouds.store}'
        passed = [at for at in (found.held_from, found.start, found.end) if at <= found.now]
        revision, revised = found.revision + len(passed), max([found.revised, *passed])
        if found.project != feed.project:
            return Shown(uid, found.start, found.end, revision, revised, 'busy',
                         f'{found.vms} vms are reserved', found.resource, 'CONFIRMED')
        lines = [found.state, f"{found.vms} vms {found.flavor} {found.image}".strip(),
                 found.description]
        lines += [self.config.login.replace('{address}', address) for address in addresses]
        lines += [f'key pair: {found.key}'] if found.key and addresses else []
        lines += [found.fault] if found.fault else []
        return Shown(uid, found.start, found.end, revision, revised, found.label,
                     '\n'.join(filter(None, lines)),
                     found.resource, 'CANCELLED' if found.state in ('cancelled', 'failed') else
                     'TENTATIVE' if found.state in ('waiting', 'pending') else 'CONFIRMED')


# Tokens ######################################################################
#
# Who may ask at all. A token is kept as its hash alone. It may end, and be good for some operations
# or for one resource only. People make, renew and revoke their own, an admin those of everybody.

#: For how long somebody's own token is made or renewed, unless they say.
OWN_FOR = timedelta(days=90)
FIELDS_OF_TOKEN = '''SELECT t.id, t.user, t.project, t.role, t.purpose, t.scopes,
                            s.name AS resource, t.added, t.ends, t.last_used, t.revoked
                       FROM token t LEFT JOIN resource s ON s.id = t.resource_id'''


class Tokens(Operations):
    """Tokens, and what ends with the last one of a person; see Service."""

    @api('POST', '/token/', role=READER, made='/token/')
    def token_add(self, user: Name = '', project: Name = '', role: Name = '', purpose: Name = '',
                  lasts: Span = None, scopes: Names = (), resource: Name = '',
                  dry_run: bool = False) -> NewTokenAnswer:
        """Makes a token for yourself, as an admin for others, and prints it: it is shown only now.

        Without --for, a token that people make for themselves is good for 90 days.

        Example:
          python cmres.py token add eva --project biology --role user --for 90d
          python cmres.py token add --scopes calendar --purpose phone
        """
        user = user or self.actor.user
        mine = user == self.actor.user
        project = project or (self.actor.project if mine else 'default')
        role = role or (self.actor.role if mine and self.actor.role != ADMIN else USER)
        self.refuse_for_others(user, project, role)
        self.check_scopes(role, scopes, resource)
        token = f'cmres_{secrets.token_urlsafe(32)}'
        with self.writing(dry_run) as now:
            self.refuse_one_more('tokens', user, project)
            ends = self.end_of_token(lasts, now)
            insert(Token, user=user, project=project, role=role, hash=hashed(token),
                   added=int(now), purpose=purpose, ends=ends, scopes=','.join(scopes),
                   resource=self.look.id_of(resource))
            until = f' until {self.config.told_time(ends)}' if ends else ''
            only = ', '.join([*scopes, *filter(None, [resource])])
            self.journal(now, 'token', f'made a token for {user} in {project} as {role}{until}'
                                       f"{only and f', only for {only}'}")
        made = {'user': user, 'project': project, 'role': role} if dry_run else {'token': token}
        return made | ({'ends': instant(ends)} if ends else {})

    def refuse_for_others(self, user: str, project: str, role: str) -> None:
        """Refuses a token of an unknown role, or one that its maker may not have."""
        refuse_unknown_word('role', role, ROLES)
        if not user or not project:
            raise Invalid('a token needs a user and a project')
        if self.actor.role == ADMIN:
            return
        if (user, project) != (self.actor.user, self.actor.project):
            raise Forbidden('you can make tokens only for yourself, in your own project '
                            f"'{self.actor.project}'. Ask an admin")
        if ROLES.index(role) > ROLES.index(self.actor.role):
            raise Forbidden(f"your role is {self.actor.role}, so you can't make a token as {role}. "
                            'Ask an admin')

    def check_scopes(self, role: str, scopes: Iterable[str], resource: str) -> None:
        """Refuses what is no scope, and those that allow nothing together."""
        for each in scopes:
            refuse_unknown_word('scopes', each, SCOPES)
        if 'claim' in scopes and role != ADMIN:
            raise Invalid('scopes: claim is what Nova asks with, which needs the role admin')
        if resource and {*scopes} - {'read'}:
            raise Invalid('a token for one resource can have the scope read, and no other')

    def end_of_token(self, lasts: timedelta | None, now: float) -> int | None:
        """When a token ends that is made or renewed now; an admin's need not."""
        if lasts is not None and lasts <= timedelta(0):
            raise Invalid('lasts: a token lasts for some time, such as 90d')
        if self.actor.role != ADMIN:
            most = timedelta(days=self.config.own_token_days)
            lasts = min(OWN_FOR, most) if lasts is None else lasts
            if lasts > most:
                raise Forbidden(f'people make and renew tokens for {self.config.own_token_days} '
                                'days at most. Ask an admin for a longer time')
        return None if lasts is None else int(now + lasts.total_seconds())

    @api('GET', '/token/', role=READER)
    def token_list(self) -> list[TokenAnswer]:
        """Lists your tokens, as an admin all: what for, until when, when used last.

        The tokens themselves are never shown again: only hashes of them are kept.

        Example:
          python cmres.py token list
        """
        own, values = self.own_tokens()
        return [self.token_public(each) for each in rows(
            f'{FIELDS_OF_TOKEN} WHERE {own} ORDER BY t.id', *values)]

    def token_public(self, found) -> dict:
        """A token as answers show it."""
        used = max(found.last_used or 0, self.shares.uses.latest(found.id)) or None
        shown = public(found._replace(last_used=used))
        return shown | {'scopes': [each for each in found.scopes.split(',') if each]}

    def own_tokens(self) -> tuple[str, tuple]:
        """The condition on the tokens that an actor may see and change."""
        if self.actor.role == ADMIN:
            return '1', ()
        return 't.user = ? AND t.project = ?', (self.actor.user, self.actor.project)

    def own_token(self, id: int):
        """A token that is not revoked and that an actor may change."""
        own, values = self.own_tokens()
        found = row(f'{FIELDS_OF_TOKEN} WHERE t.id = ? AND t.revoked IS NULL AND {own}',
                    id, *values)
        if not found:
            raise NotFound(f'there is no token {id} that is in force')
        return found

    @api('POST', '/token/<id>/renew', role=READER)
    def token_renew(self, id: int, lasts: Span = None, dry_run: bool = False) -> TokenAnswer:
        """Lets a token end later: 90 days from now, or as --for says; an admin's need not end.

        Example:
          python cmres.py token renew 3 --for 90d
        """
        with self.writing(dry_run) as now:
            found = self.own_token(id)
            if self.actor.role != ADMIN and ROLES.index(found.role) > ROLES.index(self.actor.role):
                raise Forbidden(f'token {id} is of the role {found.role}, and you are '
                                f'{self.actor.role}. Ask an admin')
            ends = self.end_of_token(lasts, now)
            change(Token, id, ends=ends)
            until = f'until {self.config.told_time(ends)}' if ends else 'without an end'
            self.journal(now, 'token', f'renewed token {id} of {found.user} {until}')
            return self.token_public(self.own_token(id))

    @api('DELETE', '/token/<id>', role=READER)
    def token_revoke(self, id: int, dry_run: bool = False) -> TokenAnswer:
        """Makes a token worthless from now on.

        With the last token of a user in a project, their feeds and subscriptions end as well. What
        they have reserved stays.

        Example:
          python cmres.py token revoke 3
        """
        with self.writing(dry_run) as now:
            found = self.own_token(id)
            self.revoke(id, now)
            ended = self.end_calendars(found.user, found.project, now)
            self.journal(now, 'token', f'revoked token {id} of {found.user}{ended}')
            return self.token_public(row(f'{FIELDS_OF_TOKEN} WHERE t.id = ?', id))

    def revoke(self, id: int, now: float) -> None:
        """Makes a token worthless, and whoever has signed in with it is signed out."""
        change(Token, id, revoked=int(now))
        if not rehearsal.on:
            run('DELETE FROM session WHERE token_id = ?', id)

    @api('DELETE', '/user/<user>', role=ADMIN)
    def user_end(self, user: Name, project: Name = '', dry_run: bool = False) -> EndedAnswer:
        """Ends all that lets a person in: tokens, sign-ins, feeds and subscriptions.

        In all projects, or in one. What they have reserved stays.

        Example:
          python cmres.py user end eva --project biology
        """
        with self.writing(dry_run) as now:
            found = rows('SELECT id, project FROM token WHERE user = ? AND revoked IS NULL', user)
            found = [each for each in found if project in ('', each.project)]
            if not found:
                where = f' in {project}' if project else ''
                raise NotFound(f"'{user}' has no token{where} that is in force")
            for each in found:
                self.revoke(each.id, now)
            ended = ''.join(self.end_calendars(user, each, now)
                            for each in sorted({each.project for each in found}))
            self.journal(now, 'token', f'revoked all tokens of {user}: {len(found)}{ended}')
        return {'user': user, 'tokens': len(found)}

    def refuse_one_more(self, what: str, user: str, project: str) -> None:
        """TooMany if a user has as many tokens, feeds or subscriptions as one may."""
        most, still = getattr(self.config, f'{what}_per_user'), STILL[what]
        number, = run(f'SELECT count(*) FROM {what[:-1]} '
                      f'WHERE user = ? AND project = ? AND {still}', user, project).fetchone()
        if self.actor.role != ADMIN and 0 < most <= number:
            raise TooMany(f'{user} has {number} {what}, and no more than {most} are allowed. '
                          'Take away one that is not needed first')

    def end_calendars(self, user: str, project: str, now: float) -> str:
        """Ends the feeds of who has no token any more, the subscriptions of who may not book; the
        end of a sentence that says so.
        """
        mine = 'WHERE user = ? AND project = ? AND'
        roles = {each.role for each in rows(
            f'SELECT role FROM token {mine} revoked IS NULL', user, project)}
        ended = []
        if not roles:
            ended.append((run(f'UPDATE feed SET revoked = ? {mine} revoked IS NULL',
                              int(now), user, project).rowcount, 'feeds'))
        if not roles - {READER}:
            ended.append((run(f'UPDATE subscription SET due = NULL {mine} due IS NOT NULL',
                              user, project).rowcount, 'subscriptions'))
        return ''.join(f'; {number} {what} of {user} ended' for number, what in ended if number)


# Records #####################################################################
#
# What was: the journal, punctuality, reports. The class on top is the service.


#: Of an occurrence o: nothing of it is there, on its way, or asked for.
NOTHING_OPEN = '''
  NOT EXISTS (SELECT 1 FROM server v WHERE v.occurrence_id = o.id AND v.state <> 'deleted')
  AND NOT EXISTS (SELECT 1 FROM server v WHERE v.occurrence_id = o.id
    AND v.id = (SELECT max(id) FROM server))
  AND NOT EXISTS (SELECT 1 FROM claim c WHERE c.occurrence = o.id AND c.due IS NOT NULL)
  AND NOT EXISTS (SELECT 1 FROM event e JOIN outbox n ON n.event_id = e.id
                   WHERE e.reservation_id = o.reservation_id AND n.due IS NOT NULL)'''
#: Of a reservation: something else speaks of it still.
STILL_KNOWN = '''(
  EXISTS (SELECT 1 FROM occurrence WHERE reservation_id = reservation.id)
  OR EXISTS (SELECT 1 FROM extra_hold WHERE reservation_id = reservation.id)
  OR EXISTS (SELECT 1 FROM proposal WHERE reservation_id = reservation.id)
  OR EXISTS (SELECT 1 FROM event WHERE reservation_id = reservation.id AND id = (SELECT max(id)
    FROM event))
  OR booked_until IS NOT NULL OR id = (SELECT max(id) FROM reservation))'''
#: VM-hours of each kind: reserved, used of that, unused; and how late a VM was at worst.
#: What runs on after its window, or stays stopped, is no use of a reservation.
HOURS = f'''
  WITH held AS (SELECT o.id, {{by}} AS of, o.vms, max(o.held_from, ?) AS begin, min(o.held_until,
    ?) AS until
                  {FROM_ALL} WHERE o.id IN ({{near}}) AND o.held_from < ? AND o.held_until > ?
                   AND {{own}}),
       ran AS (SELECT h.id, min(coalesce(v.deleted, ?), h.until) - max(v.ready, h.begin) AS used,
                      v.ready - v.planned AS late
                 FROM held h CROSS JOIN server v ON v.occurrence_id = h.id WHERE v.ready IS NOT NULL
                UNION ALL
               SELECT h.id, min(coalesce(c.gone, ?), h.until) - max(c.at, h.begin), 0
                 FROM held h CROSS JOIN claim c ON c.occurrence = h.id
                WHERE NOT EXISTS (SELECT 1 FROM server v WHERE v.uid = c.server)),
       used AS (SELECT id, sum(max(used, 0)) AS used, max(late) AS late FROM ran GROUP BY id),
       each AS (SELECT h.of, max(h.vms * (h.until - h.begin), 0) AS reserved,
                       coalesce(u.used, 0) AS used, u.late
                  FROM held h LEFT JOIN used u ON u.id = h.id)
  SELECT of, sum(reserved) / 3600.0, sum(used) / 3600.0, sum(max(reserved - used, 0)) / 3600.0,
         max(coalesce(max(late), 0), 0) FROM each GROUP BY of'''


class Records(Operations):
    """What was."""

    @api('GET', '/event/')
    @api('GET', '/reservation/<label>/events')
    def events(self, label: Label = '', project: Name = '', after: int = 0, limit: Page = 100,
               since: When = None) -> list[EventAnswer]:
        """Shows the journal: when, who, what, why; the newest lines last.

        On the command line, --follow goes on to show each event as it comes, until Ctrl-C.

        Example:
          python cmres.py events lab --follow
        """
        onward = bool(after or since)
        after = max(after, self.event_before(self.resolve(since, LAST)[0]) if since else 0)
        where = [('e.id > ?', after)]
        if label:
            where.append(self.look.among('e.reservation_id', self.look.labelled(label, project)))
        else:
            own = self.actor.project if self.actor.role != ADMIN else ''
            where += [('e.project = ? AND e.reservation_id > 0', each) for each in (project, own)
                      if each]
        found = rows('SELECT e.id, e.at, e.actor, e.code, r.label, r.project, e.sentence '
                     'FROM event e LEFT JOIN reservation r ON r.id = e.reservation_id WHERE '
                     f"1{all_of(where)} ORDER BY e.id {'ASC' if onward else 'DESC'} LIMIT {limit}",
                     *given(where))
        return [public(each) for each in (found if onward else found[::-1])]

    def event_before(self, at: float) -> int:
        """The id of the last event before an instant; they are written in the order of time."""
        low, high = 0, row('SELECT max(id) AS id FROM event').id or 0
        while low < high:
            middle = (low + high + 1) // 2
            found = row('SELECT id, at FROM event WHERE id >= ? ORDER BY id LIMIT 1', middle)
            low, high = (found.id, high) if found.at < at else (low, middle - 1)
        return low

    @api('GET', '/punctuality/')
    def punctuality(self, since: When = None) -> PunctualityAnswer:
        """Tells how late servers were begun and ready, per cloud, in seconds: median, 95 %, worst;
        and what failed.

        Example:
          python cmres.py punctuality --since 2026-11-01
        """
        first = self.resolve(since, LAST)[0] if since else int(self.clock()) - 30 * 86400
        where = [('v.planned >= ?', first), ('NOT v.borrowed', None), *self.look.visible()]
        found = rows(f"""
            SELECT v.account AS cloud, v.name, r.label, v.tries, v.fault, v.planned,
              v.ready - v.planned AS ready,
                   iif(v.tries > 1, NULL, v.begun) - v.planned + CASE
                   WHEN v.planned = o.start THEN o.start - o.held_from ELSE 0 END AS begun
              FROM server v JOIN occurrence o ON o.id = v.occurrence_id
                JOIN reservation r ON r.id = o.reservation_id
             WHERE 1{all_of(where)} ORDER BY v.account, v.id""", *given(where))
        late: dict = defaultdict(list)
        for each in found:
            late[each.cloud].append(each)
        failed = [each for each in found if each.ready is None and each.fault]
        return {'clouds': [{'cloud': cloud, 'servers': len(servers),
                            **spread('begun',
                                     [each.begun for each in servers if each.begun is not None]),
                            **spread('ready',
                                     [each.ready for each in servers if each.ready is not None]),
                            'tried_again': sum(each.tries > 1 for each in servers)}
                           for cloud, servers in late.items()],
                'failed': [{'cloud': each.cloud, 'label': each.label, 'name': each.name,
                            'tries': each.tries, 'planned': instant(each.planned),
                            'fault': each.fault} for each in failed[-100:]]}

    @api('GET', '/report/')
    def report(self, since: When = None, until: When = None,
               by_whom: Name = 'project') -> list[ReportAnswer]:
        """Adds up VM-hours reserved, used and unused, requests refused, and lateness.

        A reservation counts from its lead to its end; what runs or stays after that is not used.
        Counts the last 30 days unless --since and --until say otherwise.

        Example:
          python cmres.py report --since 2027-01-01 --by user --format csv
        """
        columns = {'project': 'r.project', 'user': 'r.user', 'resource': 's.name'}
        refuse_unknown_word('by_whom', by_whom, columns)
        now = self.clock()
        last = self.resolve(FIRST, until)[1] if until else int(now)
        first = self.resolve(since, LAST)[0] if since else last - 30 * 86400
        own = f'1{all_of(self.look.visible())}'
        told = ('reserved', 'used', 'unused', 'late_worst')
        lines: dict = defaultdict(lambda: dict.fromkeys((*told, 'refused'), 0.0))
        ways = self.look.ways({'user': '', 'project': ''}, (), first)
        begun = f'AND o.start < {last} + {LONGEST_LEAD}'
        near = ids_by((way, f'{which} {begun}') for way, which in ways)
        hours = HOURS.format(by=columns[by_whom], own=own, near=near)
        for name, *figures in run(hours, first, last, last, first,
                                  *(value for _, value in self.look.visible()), now, now):
            lines[name] |= zip(told, figures)
        self.add_forgotten(lines, by_whom, first, last)
        name_then = '(SELECT name FROM resource s WHERE s.id = resource_id)'
        refused = {'project': 'project', 'user': 'actor',
                   'resource': f"coalesce({name_then}, '')"}[by_whom]
        mine = '' if self.actor.role == ADMIN else 'AND project = ?'
        for name, count in run(f"SELECT {refused}, count(*) FROM event WHERE code = 'refused' AND "
                               "project <> '' AND reservation_id IS NULL AND at >= ? AND at < ? "
                               f'{mine} GROUP BY 1', first, last,
                               *([self.actor.project] if mine else [])):
            lines[name]['refused'] += count
        return [{by_whom: name, 'reserved_hours': round(each['reserved'], 3),
                 'used_hours': round(each['used'], 3), 'unused_hours': round(each['unused'], 3),
                 'refused': int(each['refused']), 'late_worst': round(each['late_worst'], 3)}
                for name, each in sorted(lines.items())]

    def add_forgotten(self, lines: dict, by_whom: str, first: int, last: int) -> None:
        """Adds forgotten days to the lines of a report; of one that is cut, its share."""
        own = '' if self.actor.role == ADMIN else 'AND project = ?'
        by = ("(SELECT name FROM resource s WHERE s.id = t.resource)" if by_whom == 'resource'
              else by_whom)
        share = f'(min(day + {DAY}, ?2) - max(day, ?1)) / {DAY}.0'
        sums = ', '.join(f'sum({name} * {share}) / {unit}' for name, unit in (
            ('reserved', 3600), ('used', 3600), ('unused', 3600), ('refused', 1)))
        for name, *figures, late in run(
                f"SELECT coalesce({by}, ''), {sums}, max(late) FROM tally t "
                f'WHERE day > ?1 - {DAY} AND day < ?2 {own} GROUP BY 1',
                first, last, *([self.actor.project] if own else [])):
            for field, more in zip(('reserved', 'used', 'unused', 'refused'), figures):
                lines[name][field] += more
            lines[name]['late_worst'] = max(lines[name]['late_worst'], late)

    def forget(self, now: float, most: int = 200) -> int:
        """Forgets some of what has been over for longer than `retention`; how much. The newest row
        of each table stays, so that no id is ever given twice.
        """
        before = int(now) - self.config.retention * DAY
        old = rows(f'''SELECT o.* FROM occurrence o INDEXED BY occurrence_over
                       WHERE due IS NULL AND start < ? AND "end" < ?
                         AND id < (SELECT max(id) FROM occurrence) AND {NOTHING_OPEN}
                       ORDER BY start LIMIT {most}''', before, before)
        for each in old:
            self.forget_occurrence(each)
        events = rows(f'''SELECT id, at, code, actor, project, resource_id, reservation_id
                            FROM event e WHERE at < ?
                           AND id < (SELECT max(id) FROM event) AND id <= (SELECT min(id)
                             FROM event) + {most}
                           AND NOT EXISTS (SELECT 1 FROM outbox WHERE event_id = e.id
                             AND due IS NOT NULL)
                         LIMIT {most}''', before)
        self.forget_events(events)
        gone = run(f'DELETE FROM claim WHERE id IN (SELECT id FROM claim WHERE gone < ? AND '
                   f'occurrence IS NULL '
                   f'AND due IS NULL AND id < (SELECT max(id) FROM claim) LIMIT {most})',
                   before).rowcount
        changes = rows('SELECT * FROM capacity WHERE removed IS NULL AND "end" < ? '
                       f'AND id < (SELECT max(id) FROM capacity) LIMIT {most}', before)
        for each in changes:
            self.bookings.hold_capacity(each.resource_id, each.start, each.end,
                                        NOTHING - amount_of(each, 'held_'))
            run('DELETE FROM capacity WHERE id = ?', each.id)
        return len(old) + len(events) + gone + len(changes)

    def forget_occurrence(self, old) -> None:
        """Forgets one occurrence, and its reservation if it was the last."""
        self.tally(old)
        release(old.resource_id, old.held_from, old.held_until, amount_of(old))
        run('DELETE FROM server WHERE occurrence_id = ?', old.id)
        run('DELETE FROM claim WHERE occurrence = ?', old.id)
        run('DELETE FROM occurrence WHERE id = ?', old.id)
        if not row(f'SELECT 1 AS one FROM reservation WHERE id = ? AND {STILL_KNOWN}',
                   old.reservation_id):
            self.forget_events(rows('SELECT id, at, code, actor, project, resource_id, '
                                    'reservation_id FROM event '
                                    'WHERE reservation_id = ?', old.reservation_id))
            run('DELETE FROM reservation WHERE id = ?', old.reservation_id)

    def forget_events(self, events: list) -> None:
        """Forgets events and the notices of them; what was refused stays counted."""
        for each in events:
            if each.code == 'refused' and each.project and each.reservation_id is None:
                day = int(each.at) // DAY * DAY
                self.count((day, each.project, each.actor, each.resource_id or 0), refused=1)
            run('DELETE FROM outbox WHERE event_id = ?', each.id)
            run('DELETE FROM event WHERE id = ?', each.id)

    def tally(self, old) -> None:
        """Adds what an occurrence held, and what ran of that, to its days; as HOURS reckons."""
        ran = [*run('SELECT ready, coalesce(deleted, ?2), ready - planned FROM server '
                    'WHERE occurrence_id = ?1 AND ready IS NOT NULL', old.id, old.held_until),
               *run('SELECT at, coalesce(gone, ?2), 0 FROM claim c WHERE occurrence = ?1 AND NOT '
                    'EXISTS '
                    '(SELECT 1 FROM server v WHERE v.uid = c.server)', old.id, old.held_until)]
        late = max((each[2] for each in ran), default=0)
        for day in range(old.held_from // DAY * DAY, old.held_until, DAY):
            first, last = max(day, old.held_from), min(day + DAY, old.held_until)
            reserved = old.vms * (last - first)
            used = sum(max(min(end, last) - max(begin, first), 0) for begin, end, _ in ran)
            self.count((day, old.of_project, old.of_user, old.resource_id), reserved=reserved,
                       used=used, unused=max(reserved - used, 0), late=max(late, 0))

    def count(self, whose: tuple, **figures: float) -> None:
        """Adds figures to the sums of a day, project, user and resource; lateness: the worst."""
        figures = dict.fromkeys(('reserved', 'used', 'unused', 'refused', 'late'), 0) | figures
        run('INSERT INTO tally (day, project, user, resource, reserved, used, unused, refused, '
            'late) '
            'VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET '
            'reserved = reserved + excluded.reserved, used = used + excluded.used, '
            'unused = unused + excluded.unused, refused = refused + excluded.refused, '
            'late = max(late, excluded.late)', *whose, *figures.values())


class Reservations(Approvals, Requests, Plan, Claims, Calendars, Tokens, Records):
    """The whole service, on behalf of one actor; see Service for its arguments."""


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
# When can't it come any more? A call has `call_timeout` from the instant that a worker begins it,
# and from the request that makes the server once more; where that is over it is fenced, so that
# what it has not asked for by then it never will. Calls of another process began before it lost
# the lease. From the latest end that is possible, `settle` goes by before a look is believed.
#
# Two clocks must agree before anything ends: the wall clock and the uptime. One that jumps ahead is
# doubted, and until something confirms it a pass goes by the instant to which the uptime leads.
#
# What a server needs next follows from its goal and its state alone; `due` only says when to ask.
# Of several processes one acts, by a lease with a deadline: it is renewed while passes are made, it
# is looked at in every transaction and before every call, and who lost it does nothing more.

UNDER_WAY = {'delete': 'deleting', 'start': 'starting', 'stop': 'stopping', 'shelve': 'shelving',
             'snapshot': 'saving'}
#: What wakes a server that somebody put to rest, by its state: a word of `openstack server`.
WAKES = {'shutoff': 'start', 'paused': 'unpause', 'suspended': 'resume', 'shelved': 'unshelve',
         'shelved_offloaded': 'unshelve', 'rescue': 'unrescue', 'verify_resize': 'resize confirm'}
DOWN = tuple(WAKES)[:5]
#: From which states an end can be asked for (Nova's API); from others of WAKES, a server is woken
#: first. The image that a shelved one has already will not do: Nova deletes it with the server.
ENDS_FROM = {'stop': ('active',), 'shelve': ('active', *DOWN[:3]),
             'snapshot': ('active', *DOWN[:3])}
#: What is under way has arrived in these states. What is paused still fills its host.
ARRIVED = {'starting': ('active',), 'stopping': ('shutoff', *DOWN[2:]), 'shelving': DOWN[3:]}
# it is gone, or it stays as its owner wished and is no longer ours to watch
FINAL = ('deleted', 'kept')
DRIFT = 1e-4  # seconds by which two clocks may part in one, without either being wrong
CALM = 60  # seconds that another number of servers must be up before it is told
TRIPS = 3  # failures in a row after which a cloud is left alone for a while

#: What a pass looks at once its instant has come, and the next pass waits for: table, column, rows.
DUE = {'occurrence': ('occurrence o', 'o.due', '1'), 'server': ('server v', 'v.due', '1'),
       # Each target is told in order, one notice of an owner after another.
       'notice': ('outbox n', 'n.due',
                  'n.id IN (SELECT min(id) FROM outbox WHERE due IS NOT NULL GROUP BY target, '
                  'owner)'),
       'subscription': ('subscription u', 'u.due', '1'), 'claim': ('claim c', 'c.due', '1'),
       'wait': ('wait w', 'w.due', '1'), 'pending': ('reservation r', 'r.pending', '1'),
       'proposal': ('proposal p', 'p.until', '1'),
       'staged': ('fact f', 'CAST(f.value AS REAL)', STAGED)}
#: The soonest instant of all of these that is after another one.
SOONEST = 'SELECT min(due) AS due FROM ({})'.format(' UNION ALL '.join(
    f'SELECT min({column}) AS due FROM {table} WHERE {column} > ?1 AND {which}'
    for table, column, which in DUE.values()))

SERVERS = '''SELECT v.*, r.flavor, r.image, r.network, r.key, r.security_groups, r.user_data,
                    r.metadata, r.label, r.project, r.trusted, r.notify, o.reservation_id,
                    o."end", o.resource_id, s.mode
               FROM server v CROSS JOIN occurrence o ON o.id = v.occurrence_id
               JOIN reservation r ON r.id = o.reservation_id
                 JOIN resource s ON s.id = o.resource_id'''


UNKNOWN = ('the VM {} on {} is unknown since the database was restored: `store orphans` lists such '
           'VMs and says what can be done')


def adopted() -> set[str]:
    """Servers with our mark that an admin left to people after a restore."""
    return set(json.loads(fact('adopted') or '[]'))


def orphans_in(seen: dict[str, Seen], matched: list[tuple]) -> list[Seen]:
    """Of what a cloud shows, the servers with our mark of which the store tells nothing."""
    wanted = {found.uid for _, found in matched if found}
    return [each for uid, each in seen.items() if each.mark and uid not in wanted]


def server_name(label: str, number: str) -> str:
    """The name of a VM, which is its hostname too, however long the label is.

    Nova makes a hostname of the first 63 characters of a name, puts '-' for '_' and '.', and strips
    those at the ends (nova.utils.sanitize_hostname; RFC 1123, 2.1).
    """
    word = re.sub('[^A-Za-z0-9]+', '-', label)[:63 - len(number)].strip('-')
    return (word or 'vm') + number


class LostLease(Error):
    """Another scheduler acts now; this one must not."""


@dataclasses.dataclass(eq=False)
class Job:
    """What a worker is to do, and once that ended, when, and its answer or its error."""
    key: tuple
    verb: str
    account: str
    target: Any
    taken: float | None = None  # the uptime from which its time counts; None: it waits for a worker
    fenced: bool = False        # its time is over, and it must not make anything any more
    began: float = 0.0
    ended: float = 0.0
    answer: Any = None
    error: Exception | None = None


class Trust(NamedTuple):
    """How the wall clock stood to the uptime when it was believed last, and what is doubted
    since.
    """
    boot: str      # since which start of this computer the uptime counts
    offset: float  # seconds of the wall clock less those of the uptime
    uptime: float
    doubted: float | None = None  # another offset
    since: float = 0.0            # the uptime at which that was first seen, or contradicted last


class Breaker(NamedTuple):
    """What is remembered of a cloud in trouble: failures in a row, the last one, until when it is
    left alone.
    """
    failures: int = 0
    last: float = 0
    until: float = 0
    fault: str = ''


def grouped(found: Iterable, name: str) -> list[list]:
    """Rows with the same value of a column together."""
    groups: dict = defaultdict(list)
    for each in found:
        groups[getattr(each, name)].append(each)
    return [*groups.values()]


def named(found: list, most: int = 5) -> str:
    """The names of some rows, as a sentence lists them."""
    names = ', '.join(each.name for each in found[:most])
    return f'{names} and {len(found) - most} more' if len(found) > most else names


def seconds_up() -> float:
    """Seconds since this computer was started, also while it slept, by a clock that nobody sets."""
    return time.clock_gettime(getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC))


def boot_id() -> str:
    """A name for the time since this computer was started; else one for this process."""
    try:
        with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
            return file.read().strip()
    except OSError:
        return secrets.token_hex(8)


class LifeCycle:
    """Boots what has begun, ends what is over, and looks whether it is so.

    Args:
      clock: seconds since 1970, by a clock that people and programs may set
      uptime: seconds on a clock that nobody sets; without it, a clock that is passed in is both
    """

    def __init__(self, config: Config, clouds: Clouds, clock: Callable[[], float] = time.time,
                 uptime: Callable[[], float] | None = None):
        self.config, self.clouds, self.clock = config, clouds, clock
        self.uptime = uptime or (seconds_up if clock is time.time else lambda: self.clock())
        self.boot, self.trust, self.asked = boot_id(), None, float('-inf')
        self.name = f'{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}'
        self.leased_until = self.latest = 0.0
        self.wake = threading.Event()
        self.passed = time.monotonic()  # when a pass has worked last
        self.flying: dict[tuple, Job] = {}  # calls that workers have or will have
        self.hanging: set[Job] = set()      # calls that workers have although their time is over
        # whether a call may go on is decided by one thread at a time
        self.fence = threading.Lock()
        self.results: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.ended: list[Job] = []          # calls that ended, which is not on disk yet
        self.pools: dict[str, ThreadPoolExecutor] = {}
        self.breakers: dict[str, Breaker] = defaultdict(Breaker)
        # Since when servers were seen to boot, by account.
        self.building: dict[str, dict] = defaultdict(dict)
        self.service = Reservations(config, clouds, Actor('cmres', 'default', ADMIN), self.now)
        self.service.fence = self.refuse_without_lease
        self.stale = False  # whether series are still to be carried on
        self.dropping = False  # whether more is to be dropped that was begun and not ended
        self.line_moves = False  # whether those that wait are to be looked at once more
        self.soonest = 0.0  # when something is due next
        self.seen: tuple | None = None  # the state of the store in which that was so
        self.calm_until = 0.0  # until when notices that have to wait for others are left alone
        self.zones, self.fresh_until = '', 0.0
        self.reported: set[str] = set()  # orphans that wait for an admin
        self.tidied = 0.0  # when old things were last looked for

    # Repeating

    def converge(self, now: float) -> bool:
        """One pass, if this process may act; calls that it begins go on after it and are recorded
        by a later one.
        """
        if not self.lead(now):
            self.forget()
            return False
        now = self.believed()  # we may have been frozen since
        if now < self.latest - 2:
            log.warning('the clock was set back by %.0f seconds', self.latest - now)
            self.pull_forward(now)
            self.sweep()
        self.latest = now
        self.record(now)
        self.give_up()
        self.refresh(now)
        self.dropping = self.line_moves = False
        if self.has_work(now):
            self.admit_waiting(now)
            self.drop_staged(now)
            self.plan(now)
            self.call(now)
            self.soonest, self.seen = self.next_due(now), None
        self.tidy(now)
        return True

    def settle(self) -> bool:
        """Passes until no call is under way: what `tick` does; false if another scheduler acts."""
        acting = self.converge(self.clock())
        while acting and (self.goes_on or self.under_way()):
            self.wake.wait(0 if self.goes_on else 1)
            self.wake.clear()
            acting = self.converge(self.clock())
        return acting

    @property
    def goes_on(self) -> bool:
        """Whether the next pass has something to do at once."""
        return self.stale or self.dropping or self.line_moves

    def under_way(self) -> bool:
        """Whether a call may still end in time: a worker has it, or will be free for it."""
        hanging = Counter(call.account for call in self.hanging)
        return any(hanging[call.account] < self.config.workers for call in self.flying.values())

    def has_work(self, now: float) -> bool:
        """Whether anything is due; asked anew only where somebody has written since."""
        state = state_of_store()
        if state != self.seen:
            self.seen, self.soonest = state, self.next_due()
        return self.soonest <= now

    def next_due(self, after: float = -1) -> float:
        """When, after an instant, the next pass has something to do; infinity if nothing is
        planned.
        """
        due = row(SOONEST, after).due
        return float('inf') if due is None else due

    def is_due(self, what: str, now: float) -> bool:
        """Whether anything of a kind is due."""
        table, column, which = DUE[what]
        return bool(row(f'SELECT 1 AS one FROM {table} WHERE {column} <= ? AND {which} LIMIT 1',
                        now))

    def those_due(self, what: str, query: str, now: float, tail: str = '') -> list:
        """The rows of a query that are due as one kind."""
        _, column, which = DUE[what]
        return rows(f'{query} WHERE {column} <= ? AND {which} {tail}', now)

    def run(self, stop: threading.Event) -> None:
        """Passes at every instant that is due, at every change, and at least every second, until
        `stop` is set.
        """
        import schedule
        beat = schedule.Scheduler()
        # other processes may change the store; clocks may be set
        beat.every(1).seconds.do(lambda: None)
        beat.every(max(int(10 * self.config.sweep), 1)).seconds.do(self.guarded, self.sweep)
        beat.every(max(int(self.config.verify_every), 1)).seconds.do(self.guarded, self.check_file)
        while not stop.is_set():
            wait = self.guarded_pass()
            stop.wait(self.guarded(lambda: self.rest(wait, beat)))
        self.guarded(self.finish)

    def rest(self, wait: float, beat) -> float:
        """Waits until the next pass is due; 0, so that nothing else is waited for."""
        # `schedule` goes by a clock that may be set
        self.wake.wait(max(min(wait, beat.idle_seconds, 1), 0))
        self.wake.clear()
        beat.run_pending()
        return 0

    def guarded_pass(self) -> float:
        """One pass that survives whatever happens; the seconds until the next one is due."""
        return self.guarded(self.one_pass)

    def one_pass(self) -> float:
        acts = self.converge(self.clock())
        self.passed = time.monotonic()
        if not acts:
            return 1
        # What was due already is done, or waits for a call, and each of them wakes us when it ends.
        return 0 if self.goes_on else self.soonest - self.now()

    def guarded(self, deed: Callable[[], float]) -> float:
        """Does what is done again and again: what goes wrong is only logged, and 1 the seconds to
        wait.
        """
        try:
            return deed()
        except LostLease as error:
            log.warning('%s', error)
        except (Unavailable, *STORE_ERRORS) as error:
            if not (refusal := error if isinstance(error, Unavailable) else trouble(error)):
                log.exception('this pass failed by a mistake of cmres; the next comes in a second')
            else:
                log.warning('waiting: %s', refusal)
        except Exception:  # whatever it is, the next pass may do better; people wait for machines
            log.exception('this pass failed; the next comes in a second')
        return 1

    def age(self) -> float:
        """The seconds since a pass has worked, be it that another scheduler acts."""
        return time.monotonic() - self.passed

    def finish(self, patience: float = 5) -> None:
        """Lets calls that are under way end and records them; then another scheduler may act at
        once.
        """
        self.guarded(lambda: self.wait_for_calls(time.monotonic() + patience))
        with self.fence:  # no worker begins anything after another process has begun to act
            self.leased_until = 0.0
        self.guarded(self.hand_over)
        for pool in self.pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def wait_for_calls(self, until: float) -> None:
        while self.flying and time.monotonic() < until and self.lead(self.clock()):
            self.wake.wait(0.1)
            self.wake.clear()
            self.record(self.now())

    def hand_over(self) -> None:
        """Gives the lease back, and what no worker has begun to who acts next."""
        with transaction(first=True):
            if run('UPDATE lease SET until = ? WHERE holder = ?', self.now(), self.name).rowcount:
                for call in self.flying.values():
                    if call.verb == 'boot' and call.taken is None:
                        change(Server, call.target.id, state='planned', intended=None,
                               due=self.now())

    # Who acts

    def lead(self, now: float) -> bool:
        """Whether this process may act: it has the lease, renews it, or takes one that ran out."""
        if self.leased_until - self.config.lease <= now < self.leased_until - self.config.lease / 2:
            return True
        if self.held_by_another(now):
            self.leased_until = 0.0
            return False
        with transaction(first=True):
            now = self.clock()  # we may have been frozen since; nobody else writes from here on
            if self.held_by_another(now):
                return False
            taken_over = not row('SELECT name FROM lease WHERE holder = ?', self.name)
            run('INSERT INTO lease (name, holder, until) VALUES (?, ?, ?) ON CONFLICT (name) DO '
                'UPDATE '
                'SET holder = excluded.holder, until = excluded.until',
                'scheduler', self.name, now + self.config.lease)
            if taken_over or not self.trust:
                self.recall()
            self.judge()
            if taken_over:  # whoever made the calls that are under way may never tell of them
                self.bound_calls(self.now())
                self.pull_forward(self.now())
        self.leased_until = now + self.config.lease
        if taken_over:
            self.sweep()
        return True

    def held_by_another(self, now: float) -> bool:
        found = row('SELECT holder, until FROM lease')
        # One that ends further ahead than any lease was made before the clock was set back.
        return (bool(found) and found.holder != self.name
                and now < found.until <= now + 2 * self.config.lease)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """A transaction of the process that has the lease; LostLease for any other."""
        with transaction(first=True):
            self.refuse_without_lease()
            yield

    def refuse_without_lease(self) -> None:
        if not row('SELECT name FROM lease WHERE holder = ?', self.name):
            self.leased_until = 0.0
            raise LostLease('another scheduler has taken over; this one waits its turn')

    def forget(self) -> None:
        """What ended is for the process to find out that acts now."""
        while not self.results.empty():
            self.ended.append(self.results.get())
        self.forget_calls()

    def forget_calls(self) -> None:
        for result in self.ended:
            self.hanging.discard(result)
            if self.flying.get(result.key) is result:
                del self.flying[result.key]
        self.ended.clear()

    def bound_calls(self, now: float) -> None:
        """Notes when the calls of who acted before will have ended; until then a server may
        appear.
        """
        latest = now + self.config.call_timeout
        with self.acting():
            run('UPDATE server SET called = ? '
                'WHERE intended IS NOT NULL AND due IS NOT NULL AND uid IS NULL', latest)
            # A second snapshot would make a second image.
            run('UPDATE server SET due = ? WHERE intended IS NOT NULL AND due IS NOT NULL '
                "AND goal = 'snapshot' AND state <> ?", latest, UNDER_WAY['snapshot'])
            run('UPDATE server SET intended = NULL WHERE intended IS NOT NULL AND due IS NOT NULL')

    def pull_forward(self, now: float) -> None:
        """Lets nothing wait for an instant that an older clock or another process has reckoned."""
        latest, pause = max(self.latest, now), now + self.config.retry_most
        longest = now + self.config.call_timeout
        with self.acting():
            run("UPDATE server SET due = min(due, CASE WHEN state = 'planned' THEN ? "
                "WHEN goal = 'snapshot' AND uid IS NOT NULL THEN ? ELSE ? END), "
                'called = min(called, iif(uid IS NULL, ?, ?)) WHERE due IS NOT NULL',
                pause, longest, now, longest, now)
            run('UPDATE occurrence SET due = ? WHERE due > ? AND held_from <= ? AND id IN (SELECT '
                'id FROM occurrence '
                f'WHERE due IS NOT NULL AND start <= ? + {LONGEST_LEAD})', now, now, latest, latest)
            run('UPDATE outbox SET due = min(due, ? + min(?, ? * (1 << min(tries, 20)))) '
                'WHERE due IS NOT NULL', now, RARELY, self.config.retry_first)
            run('UPDATE wait SET due = 0 WHERE due > 0')
            for each in rows('SELECT o.id, o.reservation_id, r.notify FROM occurrence o '
                             'JOIN reservation r ON r.id = o.reservation_id WHERE o.due IS NULL '
                             'AND o.cancelled IS NULL AND o."end" > ?', now):
                change(Occurrence, each.id, due=now, told=0, up_told=None)
                self.journal(now, 'clock', 'a wrong clock has ended it too early; it goes on', each)
        self.breakers.clear()
        self.latest = now

    def sweep(self) -> None:
        """Looks at every account, also for servers of ours that nothing in the store tells of."""
        if self.clock() < self.leased_until:
            for account in self.clouds.accounts():
                self.submit(('look', account), 'look', account, self.known(account))

    def check_file(self) -> None:
        """Looks for damage in the database file, aside; /readyz tells what was found."""
        self.submit(('integrity',), 'integrity', ' store', store_file.path)

    # What time it is

    def now(self) -> float:
        """Seconds since 1970 by the wall clock; while that is doubted, by the uptime."""
        return self.judged()[1]

    def judged(self) -> tuple[Trust, float]:
        """What to think of the two clocks as they are now, and what time it is then."""
        wall, up = self.read_clocks()
        trust, offset = self.trust, wall - up
        if trust and trust.boot != self.boot:  # for how long it was off, only others can tell
            trust = Trust(self.boot, trust.offset + trust.uptime - up, up)
        if not trust or offset - trust.offset <= self.config.lease + (up - trust.uptime) * DRIFT:
            return Trust(self.boot, offset, up), wall
        if trust.doubted is None or abs(offset - trust.doubted) > self.config.lease:
            trust = trust._replace(doubted=offset, since=up)
        if up >= trust.since + self.config.settle and trust.since < up:
            return Trust(self.boot, offset, up), wall
        return trust, trust.offset + up

    def read_clocks(self) -> tuple[float, float]:
        """Both clocks at one moment: again, if something came between."""
        while True:
            before, wall, up = self.uptime(), self.clock(), self.uptime()
            if up - before < 0.05:
                return wall, up

    def recall(self) -> None:
        """Recalls what the process that acted before thought of the clocks, and when."""
        found = row('SELECT value FROM fact WHERE name = ?', 'clocks')
        if found:
            self.trust = Trust(*json.loads(found.value))
            self.latest = max(self.latest, self.trust.offset + self.trust.uptime)

    def judge(self, said: Trust | None = None) -> None:
        """Keeps what is thought of the clocks, and tells when that is another; in a transaction."""
        before, self.trust = self.trust, said or self.judged()[0]
        run('INSERT INTO fact (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = '
            'excluded.value',
            'clocks', json.dumps(self.trust))
        if self.trust.doubted == (before and before.doubted):
            return
        sentence = 'the clock of this computer is believed again'
        if self.trust.doubted is not None:
            ahead = format_duration(self.trust.doubted - self.trust.offset)
            sentence = (f'the clock of this computer has jumped ahead by {ahead}, and nothing '
                        f'confirms that yet; '
                        'until then nothing is stopped or deleted because of it')
        log.warning('%s', sentence)
        journal(self.config, self.now(), 'cmres', 'clock', sentence)

    def believed(self) -> float:
        """The instant by which a pass acts; asks the clouds for theirs while the clock is
        doubted.
        """
        trust, now = self.judged()
        if trust.doubted != (self.trust and self.trust.doubted):
            with self.acting():
                self.judge()
        else:
            self.trust = trust
        if trust.doubted is None:
            return now
        if self.uptime() >= self.asked + self.config.settle / 3:
            self.asked = self.uptime()
            for account in self.clouds.accounts():
                self.submit(('time', account), 'time', account, None)
        return now

    # What is wanted

    def refresh(self, now: float) -> None:
        """Carries series on, once a day and when the zone table is another; some in each pass, so
        that none is long.
        """
        if now < self.fresh_until:
            return
        stamp = f'{instant(int(now)):%Y-%m-%d} {zone_table()}'
        done = fact('refreshed') == stamp
        if stamp != self.zones:
            ZoneInfo.clear_cache()  # the files may be others than when this process began
            self.zones = stamp
        stale = [] if done else rows(
            "SELECT id FROM reservation WHERE series <> '' AND over > ? "
            'AND carried IS NOT ? LIMIT 20',
            int(now), stamp)
        for each in stale:
            self.carry_on(each.id, stamp, now)
        self.stale = bool(stale)
        if not stale:
            self.fresh_until = (now // 86400 + 1) * 86400
        if not stale and not done:
            with self.acting():
                note_fact('refreshed', stamp)

    def carry_on(self, reservation: int, stamp: str, now: float) -> None:
        """Carries one series on; one that can't be is told of, and is tried again the next day."""
        try:
            with self.acting():
                self.service.series.refresh(reservation, now)
                change(Reservation, reservation, carried=stamp)
        # that is wrong with the store, or with all
        except (peewee.OperationalError, Unavailable, LostLease):
            raise
        except Exception as error:
            log.warning('the series of reservation %s could not be carried on: %s', reservation,
                        error,
                        exc_info=not isinstance(error, Error))
            with self.acting():
                change(Reservation, reservation, carried=stamp)
                journal(self.config, now, 'cmres', 'trouble',
                        f'it could not be carried on: {self.fault(error)}'[:1000], reservation)

    def tidy(self, now: float) -> None:
        """While no call is under way, forgets a little of what is long over."""
        if self.flying:
            return
        if not self.tidied <= now < self.tidied + 600:
            with self.acting():
                forgotten = self.service.forget(now)
            self.tidied = 0.0 if forgotten else now

    def admit_waiting(self, now: float) -> None:
        self.line_moves = False
        if any(self.is_due(each, now) for each in ('wait', 'pending', 'proposal')):
            with self.acting():
                self.line_moves = self.service.waiting.admit_waiting(now)

    def drop_staged(self, now: float) -> None:
        """Erases some of what a process had begun to write, and has not gone on with."""
        left = self.those_due('staged', 'SELECT f.name FROM fact f', now)
        self.dropping = bool(left)
        for each in left:
            with self.acting():
                Staged(self.service, each.name).drop_some(now)

    def plan(self, now: float) -> None:
        """Writes down the servers that occurrences want now, and gives up those they don't."""
        due = ('SELECT o.*, r.label, r.image, r.server, r.at_end, r.notify, r.changed, r.project, '
               's.cloud, '
               'r.waiting IS NOT NULL OR r.pending IS NOT NULL AS idle, s.no_show, s.mode '
               'FROM occurrence o JOIN reservation r ON r.id = o.reservation_id '
               'JOIN resource s ON s.id = o.resource_id')
        if self.is_due('occurrence', now):
            with self.acting():
                is_aside, _ = not_real_yet()
                for occurrence in self.those_due('occurrence', due, now):
                    if not is_aside(occurrence.reservation_id):
                        self.plan_one(occurrence, now)

    def plan_one(self, occurrence, now: float) -> None:
        over = occurrence.cancelled is not None or now >= occurrence.end
        servers = rows("SELECT id, n, name, state, ready, borrowed, uid FROM server "
                       "WHERE occurrence_id = ? AND goal = 'up' "
                       "AND state NOT IN ('deleted', 'kept') ORDER BY n", occurrence.id)
        # Machines that are there stay, also where the clock was set back to before their start.
        runs = (occurrence.image or occurrence.server) and not over and not occurrence.idle and (
            servers or now >= occurrence.held_from)
        wanted = occurrence.vms if runs else 0
        missing = sorted(set(range(1, wanted + 1)) - {server.n for server in servers})
        if missing and self.still_stopping(occurrence):  # a series starts those again
            change(Occurrence, occurrence.id, due=now + self.config.poll)
            return
        stopped = self.stopped_before(occurrence) if missing else []
        for n, before in itertools.zip_longest(missing, stopped[:len(missing)]):
            self.plan_server(occurrence, n, now, before)
        if stopped:
            self.service.bookings.count_stopped(occurrence.reservation_id, now)
        for server in servers:
            if server.n > wanted and server.borrowed and self.handed_on(occurrence, now):
                change(Server, server.id, goal='up', state='kept', due=None)
            elif server.n > wanted:
                change(Server, server.id, goal=self.goal_after(occurrence, server, over), due=now)
        self.tell_in_error(occurrence, [each for each in servers if each.n > wanted], over, now)
        if over and now >= occurrence.end + self.config.end_grace:
            self.force(occurrence, now)
        if over and not occurrence.told & FOREIGN:
            occurrence = occurrence._replace(told=occurrence.told | FOREIGN)
            self.end_foreign(occurrence, now)
        if over and not occurrence.told & LEFT:
            occurrence = occurrence._replace(told=occurrence.told | self.tell_left(occurrence, now))
        if not over and self.release_unused(occurrence, now):
            return
        if wanted:
            occurrence = self.tell_up(occurrence, now)
        told = self.announce(occurrence, over, now)
        due = self.next_look(occurrence, over, now)
        # `next_look` may have told that it failed.
        run('UPDATE occurrence SET told = told & ? | ?, up_told = ?, up_check = ?, due = ? WHERE '
            'id = ?',
            FAILED, told, occurrence.up_told, occurrence.up_check, due, occurrence.id)

    def plan_server(self, occurrence, n: int, now: float, before=None) -> None:
        """Writes down a server that is wanted: a new one, one that was there, or a series' own from
        `before`.
        """
        borrowed = bool(occurrence.server)
        number = f'-{occurrence.id}-{n}'
        # One that was there has a name of its own, which the first look tells.
        values = dict(name=occurrence.server or server_name(occurrence.label, number),
                      uid=occurrence.server or None, tries=0,
                      state='unknown' if borrowed else 'planned', begun=None,
                      account=self.clouds.account(occurrence.cloud, occurrence.project))
        if before:
            # from now on it is the new row's
            change(Server, before.id, state='deleted', deleted=now)
            values = dict(name=before.name, uid=before.uid, tries=1, state=DOWN[0], begun=now,
                          account=before.account)
        insert(Server, id=next_server(), occurrence=occurrence.id, n=n, goal='up',
               borrowed=borrowed,
               failures=0, addresses='[]', snapshot='', snapshot_id='', fault='', due=now,
               # What was asked for after the start can't be ready at the start.
               planned=max(occurrence.start, occurrence.changed), **values)

    def still_stopping(self, occurrence) -> bool:
        """Whether VMs of an earlier occurrence of the same series are on their way to be stopped or
        shelved.
        """
        return bool(row("SELECT v.id FROM occurrence o JOIN server v ON v.occurrence_id = o.id "
                        "WHERE o.reservation_id = ? AND o.id <> ? AND v.goal IN ('stop', 'shelve') "
                        "AND NOT v.borrowed "
                        "AND v.state NOT IN ('deleted', 'kept') LIMIT 1",
                        occurrence.reservation_id, occurrence.id))

    def stopped_before(self, occurrence) -> list:
        """The VMs that earlier occurrences of a series have left, stopped or shelved, on the same
        account.
        """
        account = self.clouds.account(occurrence.cloud, occurrence.project)
        return rows("SELECT v.id, v.uid, v.name, v.account FROM occurrence o JOIN server v ON "
                    "v.occurrence_id = o.id "
                    "WHERE o.reservation_id = ? AND o.resource_id = ? AND v.state = 'kept' AND NOT "
                    "v.borrowed "
                    "AND v.goal IN ('stop', 'shelve') AND v.account = ? ORDER BY v.n, v.id",
                    occurrence.reservation_id, occurrence.resource_id, account)

    def goal_after(self, occurrence, server, over: bool) -> str:
        """What becomes of a server that is up no longer; one that never was up is not worth
        keeping.
        """
        if server.borrowed:
            return occurrence.at_end
        asked = (over and occurrence.cancelled is None and server.ready
                 and server.state not in ('error', 'deleting'))
        return occurrence.at_end if asked else 'delete'

    def tell_in_error(self, occurrence, servers: list, over: bool, now: float) -> None:
        """Tells of servers that were up once and are in error at the end: nothing can be done."""
        lost = [each for each in servers
                if each.state == 'error' and each.ready and not each.borrowed]
        if lost and over and occurrence.cancelled is None and occurrence.at_end != 'delete':
            self.journal(now, 'forced', f'the agreed {occurrence.at_end} can not be done with VMs '
                         f'in error, so these are deleted: {named(lost)}', occurrence)

    def handed_on(self, occurrence, now: float) -> bool:
        """Whether the next reservation of the same machine has begun, so that it must not be
        stopped between.
        """
        return bool(row('SELECT o.id FROM occurrence o JOIN reservation r ON r.id = '
                        'o.reservation_id '
                        "WHERE r.server = ? AND r.server <> '' AND o.id <> ? AND o.cancelled IS "
                        "NULL AND o.due IS NOT NULL "
                        'AND o.held_from <= ? AND o."end" > ?', occurrence.server, occurrence.id,
                        now, now))

    def force(self, occurrence, now: float) -> None:
        """Deletes after the grace time what could not be stopped, shelved or saved: others were
        promised its place.
        """
        late = rows("SELECT id, name FROM server WHERE occurrence_id = ? AND goal <> 'delete' AND "
                    "NOT borrowed "
                    "AND state NOT IN ('deleted', 'kept')", occurrence.id)
        for server in late:  # an image that is not complete by now never will be
            change(Server, server.id, goal='delete', state='active', snapshot='', due=now)
        if late:
            self.journal(now, 'forced', f'the agreed {occurrence.at_end} was not done within '
                         f'{format_duration(self.config.end_grace)} after the end, so these VMs '
                         f'are deleted: {named(late)}', occurrence)

    def release_unused(self, occurrence, now: float) -> bool:
        """Warns of, and then releases, one without machines on which nobody has booted any; whether
        it did.
        """
        boots = occurrence.image or occurrence.server or occurrence.idle
        if not occurrence.no_show or not occurrence.mode or boots or row(
                'SELECT id FROM claim WHERE occurrence = ? LIMIT 1', occurrence.id):
            return False
        begun = max(occurrence.start, occurrence.changed)  # who was let in late has as long
        if now >= begun + occurrence.no_show:
            found = self.service.look.occurrence(occurrence.id)
            self.service.admission.cancel([found], now,
                                f'nobody has used it within {format_duration(occurrence.no_show)}')
            return True
        if now >= begun + occurrence.no_show // 2 and not occurrence.told & UNUSED:
            until = self.config.told_time(begun + occurrence.no_show)
            self.journal(now, 'unused', f'it is released at {until} unless a machine '
                         'is booted on it', occurrence)
            change(Occurrence, occurrence.id, told=occurrence.told | UNUSED,
                   due=begun + occurrence.no_show)
            return True
        return False

    def end_foreign(self, occurrence, now: float) -> None:
        """Reports machines that people booted by themselves on what is over now; deletes them if
        that is set.
        """
        foreign = rows('SELECT c.server FROM claim c WHERE c.occurrence = ? AND c.due IS NOT NULL '
                       'AND c.server NOT IN '
                       '(SELECT uid FROM server WHERE uid IS NOT NULL AND occurrence_id = ?)',
                       occurrence.id, occurrence.id)
        if foreign:
            deed = 'are deleted' if self.config.end_foreign else 'go on'
            self.journal(now, 'foreign',
                         f"{len(foreign)} machines that were booted by hand {deed}: "
                         f"{', '.join(each.server for each in foreign)}", occurrence)
        for each in foreign if self.config.end_foreign else ():
            self.submit(('clear', each.server), 'clear', occurrence.cloud, each.server)

    def tell_up(self, occurrence, now: float):
        """Tells how many servers are up, if that was not told yet; the occurrence with what was.

        That all are up is told at once the first time, and from the start on that some are not, if
        it is known why. Any other change is told when it has lasted for CALM.
        """
        servers = rows('SELECT name, state, fault, ready, addresses, borrowed FROM server '
                       "WHERE occurrence_id = ? AND goal = 'up' "
                       "AND state NOT IN ('deleted', 'kept') ORDER BY n", occurrence.id)
        lacking = [each for each in servers if each.state != 'active']
        up = len(servers) - len(lacking)
        full = up >= occurrence.vms
        if self.up_is_told(occurrence, up, full) or not full and now < occurrence.start:
            return occurrence._replace(up_check=None)
        reason = any(each.fault or self.by_hand(each) for each in lacking)
        first = not occurrence.told & (READY if full else READY | SHORT) and (full or reason)
        check = now if first else occurrence.up_check or now + CALM
        if check > now:
            return occurrence._replace(up_check=check)
        if full:
            self.tell_ready(occurrence, servers, now)
        else:
            code = 'stopped' if any(map(self.by_hand, lacking)) else 'trouble'
            self.journal(now, code, f'{up} of {occurrence.vms} VMs are up; '
                         f'{self.why_not_up(lacking)}', occurrence)
        told = occurrence.told & ~SHORT | READY if full else occurrence.told | SHORT
        return occurrence._replace(up_told=up, up_check=None, told=told)

    def up_is_told(self, occurrence, up: int, full: bool) -> bool:
        """Whether what was told last is that so many servers are up."""
        if occurrence.up_told is None:
            return False
        short = bool(occurrence.told & SHORT)
        return not short and occurrence.up_told >= occurrence.vms if full else (
            short and occurrence.up_told == up)

    def tell_ready(self, occurrence, servers: list, now: float) -> None:
        late = format_duration(max(max(each.ready for each in servers) - occurrence.start, 0))
        when = ' again' if occurrence.told & READY else f', {late} after the start'
        there = ', '.join(f"{each.name} {' '.join(json.loads(each.addresses))}" for each in servers)
        self.journal(now, 'ready', f'all {len(servers)} are up{when}: {there}', occurrence)

    def by_hand(self, server) -> bool:
        """Whether somebody has put a server to rest; what was so before, we start ourselves."""
        return server.state in WAKES and bool(server.ready) and not server.borrowed

    def why_not_up(self, servers: list) -> str:
        """The reasons for which servers are not up, each with those that it concerns."""
        reasons: dict = defaultdict(list)
        for each in servers:
            stopped = self.by_hand(each) and (
                f'{each.state}; cmres starts nothing that somebody has stopped, so its owner must '
                f'do that: openstack server {WAKES[each.state]} NAME')
            fault = each.fault.rstrip('.') or 'the cloud is still starting them'
            reasons[stopped or fault].append(each)
        return '; '.join(f'{named(those)}: {reason}' for reason, those in reasons.items())

    def tell_left(self, occurrence, now: float) -> int:
        """Tells what has become of servers that were to stay or to be saved; LEFT once it has."""
        left = rows('SELECT name, goal, state, snapshot FROM server WHERE occurrence_id = ? '
                    "AND (goal IN ('stop', 'shelve', 'snapshot') OR snapshot <> '') ORDER BY n",
                    occurrence.id)
        if any(each.state not in FINAL and each.goal != 'delete' for each in left):
            return 0
        saved = ', '.join(f'{each.name} as {each.snapshot}' for each in left if each.snapshot)
        if saved:
            self.journal(now, 'snapshot', f'saved: {saved}', occurrence)
        for stay in grouped([each for each in left if each.state == 'kept'], 'goal'):
            how = 'shelved' if stay[0].goal == 'shelve' else 'stopped'
            self.journal(now, 'stopped', f'{how} and not deleted: {named(stay)}', occurrence)
        return LEFT

    def announce(self, occurrence, over: bool, now: float) -> int:
        """Tells of a start or an end that comes soon, once; what was told so far."""
        soon, ending = self.notice_times(occurrence)
        if not over and not occurrence.told & SOON and soon <= now < occurrence.start:
            self.journal(now, 'soon', f'starts in {format_duration(occurrence.start - now)}',
                         occurrence)
            return occurrence.told | SOON
        if not over and not occurrence.told & ENDING and ending <= now:
            self.journal(now, 'ending', f'ends in {format_duration(occurrence.end - now)}',
                         occurrence)
            return occurrence.told | ENDING
        return occurrence.told

    def notice_times(self, occurrence) -> tuple[float, float]:
        """When a start and an end are announced; the end of a short window, in its middle."""
        length = occurrence.end - occurrence.start
        return occurrence.start - self.config.notice, occurrence.end - min(self.config.notice,
                                                                           length / 2)

    def next_look(self, occurrence, over: bool, now: float) -> float | None:
        """When an occurrence must be planned again; never, once it is over and nothing is left to
        do.
        """
        if not over:
            comes = (*self.notice_times(occurrence), occurrence.held_from, occurrence.start,
                     occurrence.end,
                     *(max(occurrence.start, occurrence.changed) + each
                       for each in (occurrence.no_show // 2, occurrence.no_show)),
                     occurrence.up_check or 0)
            return min(each for each in comes if each > now)
        if row("SELECT id FROM server WHERE occurrence_id = ? AND state NOT IN ('deleted', 'kept') "
               "LIMIT 1",
               occurrence.id):
            return now + self.config.poll
        if occurrence.cancelled is None:
            self.tell_end(occurrence, now)
        if occurrence.at_end == 'stop':
            change(Occurrence, occurrence.id, due=None)
            self.service.bookings.count_stopped(occurrence.reservation_id, now)
        return None

    def tell_end(self, occurrence, now: float) -> None:
        if occurrence.idle:
            found = self.service.look.occurrence(occurrence.id)
            self.service.admission.cancel([found], now, 'it waited in vain')
            return
        found = row('SELECT count(ready) AS ever, max(fault) AS fault FROM server WHERE '
                    'occurrence_id = ?',
                    occurrence.id)
        if (occurrence.image or occurrence.server) and not found.ever:
            run('UPDATE occurrence SET told = told | ? WHERE id = ?', FAILED, occurrence.id)
            fault = (found.fault or '').rstrip('.') or 'the life cycle did not run'
            self.journal(now, 'failed', f'never up: {fault}', occurrence)
        else:
            self.journal(now, 'ended', 'its time was over', occurrence)

    def journal(self, now: float, code: str, sentence: str, about) -> None:
        """An event of the life cycle, about a row that tells its reservation and whom to notify."""
        self.note(now, code, sentence, about, json.loads(about.notify))

    def note(self, now: float, code: str, sentence: str, about,
             notify: Iterable[str] | None = None) -> None:
        """An event of one server, which is only logged: `tell_up` tells of all of them together."""
        occurrence = getattr(about, 'occurrence_id', about.id)
        journal(self.config, now, 'cmres', code, sentence[:1000], about.reservation_id, notify,
                occurrence)

    def look_again(self, occurrence: int, now: float) -> None:
        """Lets this pass plan an occurrence whose servers are no longer as they were."""
        run('UPDATE occurrence SET due = ? WHERE id = ? AND due > ?', now, occurrence, now)

    # What to do

    def call(self, now: float) -> None:
        """Hands the calls that are due to workers, each after its intent is written."""
        servers = self.those_due('server', SERVERS, now, 'ORDER BY +v.planned, v.id')
        due = [server for server in servers if not self.busy(('server', server.id))]
        notices = self.next_notices(now)
        polls = self.those_due(
            'subscription', 'SELECT u.* FROM subscription u', now, 'ORDER BY u.due')
        claims: dict = defaultdict(list)
        for each in self.those_due('claim', 'SELECT c.server, s.cloud FROM claim c JOIN resource s '
                                   'ON s.id = c.resource_id', now, 'LIMIT 100'):
            claims[each.cloud].append(each.server)
        looks, calls, waits = set(), [], {}
        if due:
            with self.acting():
                for server in due:
                    # the call was given up, or never reached a worker
                    if server.intended is not None:
                        late = (f'the cloud {server.account} did not answer within '
                                f'{self.config.call_timeout:g} seconds')
                        change(Server, server.id, intended=None, called=now, fault=late)
                    verb = 'look' if self.left_alone(server, now) else self.next_call(server)
                    starts = verb in ('boot', 'start') and server.goal == 'up'
                    if starts and self.must_wait(server, waits, now):
                        continue
                    looks |= {server.account} if verb == 'look' else set()
                    calls += self.intend(verb, server, now) if verb != 'look' else []
        for verb, server in calls:
            self.submit(('server', server.id), verb, server.account, server)
        for account in looks:
            if self.breakers[account].until <= now:
                self.submit(('look', account), 'look', account, self.known(account))
        for notice in notices:
            self.submit(('notice', notice.target, notice.owner), 'notice', ' notices', notice)
        for account, uids in claims.items():
            self.submit(('claims', account), 'trace', account, uids)
        # one at a time of each host: one that is slow holds no more than a worker
        for each in polls:
            self.submit(('poll', urlsplit(each.url).hostname), 'poll', ' calendars', each)

    def next_notices(self, now: float) -> list:
        """The notices that go out now: by turns of their owners, and few to one host at a time.

        Each target is told in order, one notice of an owner after another. An owner has a quarter
        of the workers and mail half of them: silent hosts of some delay nobody else's notices.
        """
        under_way = [key for key in self.flying if key[0] == 'notice' and self.busy(key)]
        if len(under_way) >= self.config.workers:
            return []
        owners = Counter(key[2] for key in under_way)
        hosts = Counter(host_of(key[1]) for key in under_way)
        if now < self.calm_until:  # nothing has changed for those that had to wait
            return []
        _, is_aside = not_real_yet()
        heads = [each for each in self.those_due('notice', NOTICES, now, 'ORDER BY n.id')
                 if not is_aside(each.event)]
        queues = {those[0].owner: iter(those) for those in grouped(heads, 'owner')}
        chosen: list = []
        while queues and len(under_way) + len(chosen) < self.config.workers:
            owner = min(queues, key=owners.__getitem__)
            full = owners[owner] >= max(self.config.workers // 4, 1)
            may_go = (each for each in queues[owner] if not full and self.has_room(each, hosts))
            notice = next(may_go, None)
            if notice is None:
                del queues[owner]
                continue
            chosen.append(notice)
            owners[owner] += 1
            hosts[host_of(notice.target)] += 1
        self.calm_until = now + 0.5 if len(heads) > len(chosen) else 0.0
        return chosen

    def has_room(self, notice, hosts: Counter) -> bool:
        """Whether a notice can go out while so many are on their way; the operator's can."""
        if self.busy(('notice', notice.target, notice.owner)):
            return False
        host = host_of(notice.target)
        most = PER_HOST if host else max(self.config.workers // 2, 1)
        return not notice.owner or hosts[host] < most

    def left_alone(self, server, now: float) -> bool:
        """Whether a cloud is in such trouble that calls to it wait; a look then finds out whether
        it is over.
        """
        breaker = self.breakers[server.account]
        if breaker.failures < TRIPS and breaker.until <= now:
            return False
        change(Server, server.id, due=max(breaker.until, now + self.config.poll),
               fault=breaker.fault[:500])
        if server.fault != breaker.fault[:500]:
            self.look_again(server.occurrence_id, now)
        return True

    def must_wait(self, server, waits: dict, now: float) -> bool:
        """Whether a server can't start since its resource is closed or has less than is booked.

        Args:
          waits: by resource, what is known of that in this pass
        """
        if server.resource_id not in waits:
            place = row('SELECT * FROM resource WHERE id = ?', server.resource_id)
            waits[place.id] = self.service.waits_for(place, now)
        why, until, which = waits[server.resource_id]
        if which is not None and server.occurrence_id not in which:
            return False
        change(Server, server.id, due=min(until, now + CALM), fault=why[:500])
        if server.fault != why[:500]:
            self.look_again(server.occurrence_id, now)
        return True

    def next_call(self, server) -> str:
        """What a server needs next."""
        if server.state == 'planned':
            return 'boot' if server.goal == 'up' else 'drop'
        if server.state == UNDER_WAY['snapshot']:
            return 'verify'
        if server.state in UNDER_WAY.values() or not server.uid:
            return 'look'
        if server.goal == 'up' and server.state in DOWN and (server.borrowed or not server.ready):
            return 'start'
        if server.goal == 'up' and server.borrowed:
            return 'look'
        if server.goal == 'delete' or server.goal == 'up' and server.state == 'error':
            return 'delete'
        if server.state in ENDS_FROM.get(server.goal, ()):
            return server.goal
        arrived = self.arrived(UNDER_WAY.get(server.goal, ''), server.state)
        asleep = server.state in WAKES and not arrived
        return 'start' if server.goal in ENDS_FROM and asleep else 'look'

    def intend(self, verb: str, server, now: float) -> list:
        """Writes what will be done; the calls that it takes."""
        if verb == 'drop':
            change(Server, server.id, state='deleted', deleted=now, due=None)
            return []
        change(Server, server.id, intended=now, due=now + self.config.call_timeout)
        if verb == 'boot':
            server = server._replace(tries=server.tries + 1)
            change(Server, server.id, state='build', tries=server.tries, uid=None, begun=now)
        return [(verb, server)]

    def known(self, account: str) -> list[str]:
        """The servers that must be there on an account."""
        return [each.uid for each in rows(
            "SELECT uid FROM server WHERE account = ? AND due IS NOT NULL AND uid IS NOT NULL "
            "AND (goal = 'up' OR borrowed) UNION ALL "
            "SELECT uid FROM server WHERE account = ? AND state = 'kept' AND NOT borrowed",
            account, account)]

    def submit(self, key: tuple, verb: str, account: str, target) -> None:
        if self.busy(key):
            return
        self.flying[key] = call = Job(key, verb, account, target)
        try:
            # one pool an account: a cloud that hangs holds nobody else's workers
            if account not in self.pools:
                self.pools[account] = ThreadPoolExecutor(self.config.workers,
                                                         thread_name_prefix=account)
            self.pools[account].submit(self.work, call)
        except RuntimeError:  # no thread can be started, so that nobody would ever tell of it
            del self.flying[key]
            raise

    def busy(self, key: tuple) -> bool:
        """Whether a call is under way, or waits for a worker, however long."""
        return key in self.flying

    def give_up(self) -> None:
        """Fences the calls whose own time is over; a look decides what became of them."""
        with self.fence:
            for key, call in [*self.flying.items()]:
                call.fenced = (call.taken is not None
                               and self.uptime() >= call.taken + self.config.call_timeout)
                if call.fenced:
                    self.hanging.add(self.flying.pop(key))

    def go_on(self, call: Job) -> None:
        """Gives a call its time from now on.

        Raises:
          LostLease: another process may act.
          CloudError: its time is over already; what it was going to ask for has not been asked.
        """
        with self.fence:
            up, now = self.uptime(), self.clock()
            if not self.leased_until - self.config.lease <= now < self.leased_until:
                raise LostLease('the time for this call ran out before it began')
            if (call.fenced or call.taken is not None
                and up >= call.taken + self.config.call_timeout):
                raise CloudError(f'the cloud {call.account} did not answer within '
                                 f'{self.config.call_timeout:g} '
                                 'seconds, so that nothing was asked for', sure=True)
            call.taken = up

    def work(self, call: Job) -> None:
        """A worker's whole job: one call, if it is not too late for it; the next pass records
        it.
        """
        call.began = self.now()
        try:
            self.go_on(call)
            call.answer = getattr(self, f'do_{call.verb}')(call)
        except Exception as caught:  # the pass that records it decides what it means
            call.error = caught
        call.ended = self.now()
        self.results.put(call)
        self.wake.set()

    def do_boot(self, call: Job) -> str:
        server = call.target
        return self.clouds.open(call.account).boot(Machine(
            server.name, self.mark(server), server.flavor, server.image, server.network, server.key,
            tuple(json.loads(server.security_groups)), server.user_data,
            json.loads(server.metadata),
            server.label if server.mode else '',
            self.clouds.sight(call.account, server.project, json.loads(server.trusted)),
            lambda: self.go_on(call)))

    def do_delete(self, call: Job) -> None:
        self.clouds.open(call.account).delete(call.target.uid)

    def do_start(self, call: Job) -> None:
        self.clouds.open(call.account).start(call.target.uid)

    def do_stop(self, call: Job) -> None:
        self.clouds.open(call.account).stop(call.target.uid)

    def do_shelve(self, call: Job) -> None:
        self.clouds.open(call.account).shelve(call.target.uid)

    def do_snapshot(self, call: Job) -> tuple[str, str]:
        server = call.target
        name = f'{server.name}-{instant(server.end):%Y%m%dT%H%M%S}'
        return name, self.clouds.open(call.account).snapshot(server.uid, name)

    def do_integrity(self, call: Job) -> str:
        return look_for_damage(call.target)

    def do_verify(self, call: Job) -> bool | None:
        return self.clouds.open(call.account).saved(call.target.snapshot_id)

    def do_look(self, call: Job) -> tuple[list[Seen], set[str]]:
        """The servers with our marks, and those of the known ones that are gone for sure.

        Nova lists a server without its tags for a moment between its build request and its cell, so
        that one which must be there is asked for by its id before it is taken for gone.
        """
        cloud = self.clouds.open(call.account)
        seen = [each for each in cloud.servers() if each.state not in GONE]
        # the others' turn comes with the next
        unseen = sorted(set(call.target) - {each.uid for each in seen})[:100]
        found = {uid: cloud.server(uid) for uid in unseen}
        gone = {uid for uid, each in found.items() if each is None or each.state in GONE}
        return seen + [found[uid] for uid in unseen if uid not in gone], gone

    def do_clear(self, call: Job) -> None:
        self.clouds.open(call.account).delete(call.target)

    def do_notice(self, call: Job) -> None:
        notice, found = call.target, None
        if (notice.occurrence or 0) > 0:
            found = next(iter(self.service.look.in_order([notice.occurrence])), None)
        elif notice.reservation_id:
            found = self.service.look.next_of(notice.reservation_id)
        deliver(self.config, notice, public(found) if found else {})

    def do_trace(self, call: Job) -> dict[str, str | None]:
        return self.clouds.open(call.account).hosts(call.target)

    def do_time(self, call: Job) -> float | None:
        """By how much the clock of a cloud is ahead of the uptime."""
        said = self.clouds.open(call.account).time()
        return None if said is None else said - self.uptime()

    def do_poll(self, call: Job) -> dict:
        with acting_for(call.target.user):
            return self.service.poll(call.target)

    def mark(self, server) -> str:
        return f'{self.clouds.store}-{server.id}-{server.tries}'

    # What became of it

    def record(self, now: float) -> None:
        """Writes down the results of the calls that ended since the last pass; they wait until that
        has worked.
        """
        while not self.results.empty():
            result = self.results.get()
            # The clock may have been set back since.
            result.began, result.ended = min(result.began, now), min(result.ended, now)
            self.ended.append(result)
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

    def record_alone(self, result: Job, now: float) -> None:
        """Records one result; one that can't be recorded costs the others nothing, and a look finds
        out later.
        """
        try:
            with Attempt():
                self.record_one(result, now)
        except (*STORE_ERRORS, LostLease):
            raise
        except Exception:
            log.exception('the result of %s for %s could not be recorded', result.verb,
                          result.account)

    def record_one(self, result: Job, now: float) -> None:
        if result.key[0] != 'server':
            if not isinstance(result.error, LostLease):  # else it is due still
                getattr(self, f'record_{result.verb}')(result, now)
            return
        server = row(f'{SERVERS} WHERE v.id = ?', result.target.id)
        if server.state in FINAL or server.tries != result.target.tries:
            return
        change(Server, server.id, intended=None)
        if isinstance(result.error, LostLease):
            change(Server, server.id, due=now,
                   **({'state': 'planned'} if result.verb == 'boot' else {}))
        elif result.verb == 'boot':
            self.record_boot(server, result, now)
        elif result.error:
            # A server that can't do that is in another state than was thought: a look tells which.
            otherwise = getattr(result.error, 'details', {}).get('status') == 409
            self.put_off(server, self.fault(result.error), now, self.retry_after(result.error),
                         called=result.ended, **({'state': 'unknown'} if otherwise else {}))
        elif result.verb == 'verify':
            self.record_verify(server, result.answer, now)
        else:
            saved = (dict(zip(('snapshot', 'snapshot_id'), result.answer))
                     if result.verb == 'snapshot' else {})
            change(Server, server.id, state=UNDER_WAY[result.verb], called=result.ended,
                   due=now + self.config.poll, **saved)

    def record_boot(self, server, result: Job, now: float) -> None:
        begun, error = result.began, result.error
        if not error:
            due = now + self.config.poll if server.goal == 'up' else now
            # it was given up too early
            state = 'build' if server.state == 'planned' else server.state
            change(Server, server.id, state=state, uid=result.answer, begun=begun,
                   called=result.ended, due=due)
        elif isinstance(error, Error) and getattr(error, 'sure', True):
            self.put_off(server, str(error), now, self.retry_after(error), state='planned',
                         begun=begun,
                         called=result.ended)
        elif not server.uid:  # a look has not found it yet
            self.tell_trouble(server, self.fault(error), now)
            change(Server, server.id, fault=self.fault(error)[:500], begun=begun,
                   called=result.ended,
                   due=result.ended + self.config.settle)

    def record_verify(self, server, complete: bool | None, now: float) -> None:
        if complete:
            change(Server, server.id, goal='delete', state='active', due=now)
            self.look_again(server.occurrence_id, now)
        elif complete is None:
            self.put_off(server, f'the image {server.snapshot} was not completed', now,
                         state='active')
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
            self.note(now, 'trouble', f'{server.name}: {fault}', server)
            self.look_again(server.occurrence_id, now)

    def pause(self, failures: int, longest: float = 0) -> float:
        """The seconds before something is tried again that has failed so often.

        Args:
          longest: seconds that it grows to; 0: those of the setting `retry_most`
        """
        pause = self.config.retry_first * 2 ** min(failures - 1, 20)
        return min(pause, longest or self.config.retry_most) * random.uniform(0.8, 1.2)

    def retry_after(self, error: Exception) -> float:
        """The seconds that a cloud asks us to wait; 0 if it doesn't."""
        text = getattr(error, 'details', {}).get('retry_after') or '0'
        return min(float(text), 3600) if re.fullmatch(r'[0-9]{1,9}', str(text)) else 0

    def fault(self, error: Exception) -> str:
        return str(error) if isinstance(error, Error) else f'{type(error).__name__}: {error}'

    def note_health(self, result: Job, now: float) -> None:
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

    def record_clear(self, result: Job, now: float) -> None:
        if result.error:
            log.warning('could not remove the server %s that nothing wants: %s', result.target,
                        result.error)

    def record_integrity(self, result: Job, now: float) -> None:
        if not result.error:
            note_check(now, result.answer)

    def record_notice(self, result: Job, now: float) -> None:
        notice, error = result.target, result.error
        self.calm_until = 0.0
        if not error:
            change(Outbox, notice.id, due=None, fault='')
            if notice.tries:
                self.hurry_to(host_of(notice.target), now)
            return
        tries = notice.tries + 1
        due = now + self.pause(tries, RARELY)
        if now - notice.at > GIVE_UP:
            self.give_up_telling(notice, error, now)
            # What comes after it goes to the same dead end, so it need not be tried as often anew.
            run('UPDATE outbox SET tries = ?, due = ? WHERE id = (SELECT min(id) FROM outbox WHERE '
                'due IS NOT NULL AND target = ? AND owner = ?)',
                tries, due, notice.target, notice.owner)
            return
        change(Outbox, notice.id, tries=tries, due=due, fault=str(error)[:500])

    def give_up_telling(self, notice, error: Exception, now: float) -> None:
        """Gives up a notice, and what else waits for the same target for as long."""
        given_up = run(
            'UPDATE outbox SET due = NULL, fault = ? WHERE id IN (SELECT n.id FROM outbox n '
            'JOIN event e ON e.id = n.event_id WHERE n.due IS NOT NULL AND n.target = ? '
            'AND n.owner = ? AND e.at < ?)', f'given up: {error}'[:500], notice.target,
            notice.owner, now - GIVE_UP).rowcount
        log.warning('gave up telling %s of event %s%s: %s', notice.target, notice.event,
                    f' and {given_up - 1} others' if given_up > 1 else '', error)

    def hurry_to(self, host: str, now: float) -> None:
        """Lets all notices go out that wait because of a host, or of our mail server, that is well
        again.
        """
        for each in rows(f"{NOTICES} WHERE n.due > ? AND {DUE['notice'][2]}", now):
            if host_of(each.target) == host:
                change(Outbox, each.id, due=now)

    def record_trace(self, result: Job, now: float) -> None:
        """Lets claims count as long as their servers are there, on a host of the resource."""
        if result.error:
            run(f"UPDATE claim SET due = ? WHERE due <= ? AND server IN "
                f"({', '.join('?' * len(result.target))})",
                now + self.config.sweep, now, *result.target)
            return
        for uid, host in result.answer.items():
            for claim in rows('SELECT c.id, c.occurrence, s.hosts FROM claim c JOIN resource s ON '
                              's.id = c.resource_id '
                              'WHERE c.server = ? AND c.due IS NOT NULL AND s.cloud = ?', uid,
                              result.account):
                hosts = json.loads(claim.hosts)
                elsewhere = host is None or host and hosts and host not in hosts
                later = now + (self.config.sweep if host else self.config.poll)
                change(Claim, claim.id, due=None if elsewhere else later,
                       gone=now if elsewhere else None)

    def record_time(self, result: Job, now: float) -> None:
        """Lets a cloud's clock confirm a doubted one, or contradict it for as long as it does."""
        trust, said = self.trust, result.answer
        slack = self.config.lease + result.ended - result.began
        if said is None or trust.doubted is None or said < trust.offset - slack:
            return
        up = self.uptime()
        if abs(said - trust.doubted) <= slack:
            self.judge(Trust(self.boot, trust.doubted, up))
        else:
            self.judge(trust._replace(offset=min(max(said, trust.offset), trust.doubted), since=up))

    def record_poll(self, result: Job, now: float) -> None:
        """Notes what a look at somebody's calendar gave; what it books is booked already."""
        subscription, error = result.target, result.error
        tries = subscription.tries + 1 if error else 0
        pause = max(self.config.calendar_poll, self.pause(tries, RARELY) if error else 0)
        fault = {'fault': self.fault(error)[:500]} if error else {'fault': ''} | result.answer
        if error and str(error) != subscription.fault:
            self.service.journal(now, 'trouble',
                                 f'the calendar {subscription.id} of {subscription.user}: {error}')
        run('UPDATE subscription SET due = ? WHERE id = ? AND due IS NOT NULL', now + pause,
            subscription.id)
        change(Subscription, subscription.id, tries=tries, polled=now, **fault)

    def record_look(self, result: Job, now: float) -> None:
        """Compares what a cloud shows with what is written."""
        account = result.account
        if result.error:
            pause = now + max(self.config.poll, self.config.retry_first)
            run('UPDATE server SET due = max(due, ?) WHERE account = ? AND due <= ?',
                pause, account, pause)
            return
        answer, gone = result.answer
        seen = {each.uid: each for each in answer}
        vanished, matched = [], self.matched(seen)
        builds = {each.mark for each in answer if each.state == 'build'}
        self.building[account] = {each: since for each, since in self.building[account].items()
                                  if f'{self.clouds.store}-{each[0]}-{each[1]}' in builds}
        for server, found in matched:
            if server.state in FINAL:
                if (not found and server.account == account and server.uid in gone
                    and not server.borrowed):
                    change(Server, server.id, state='deleted', deleted=now)
                    self.service.bookings.count_stopped(server.reservation_id, now)
                continue
            if found:
                self.record_seen(server, found, now)
            elif server.account == account and (server.uid in gone or not server.uid
                                                or server.goal != 'up'
                                                and not server.borrowed):
                vanished += self.record_missing(server, result.began, now)
        self.tell_vanished(vanished, now)
        run("UPDATE server SET due = ? WHERE account = ? AND goal = 'up' AND state = 'active' AND "
            "state <> 'deleted'",
            now + self.config.sweep, account)
        self.clear_orphans(account, orphans_in(seen, matched), now)

    def matched(self, seen: dict[str, Seen]) -> list[tuple]:
        """The servers that the store tells of, each with what a cloud shows of it, if anything."""
        marked = {each.mark: each for each in reversed(seen.values()) if each.mark}
        known = rows(f"{SERVERS} WHERE v.state <> 'deleted' AND (v.tries > 0 OR v.borrowed)")
        return [(server, seen.get(server.uid) or (
            None if server.borrowed else marked.get(self.mark(server)))) for server in known]

    def clear_orphans(self, account: str, orphans: list[Seen], now: float) -> None:
        """Removes servers of ours that nothing wants; after a restore, once an admin says so."""
        left, restored = adopted(), fact('restored')
        for each in orphans:
            if each.uid in left or now - each.made < self.config.orphan_grace:
                continue
            if not restored:
                self.submit(('clear', each.uid), 'clear', account, each.uid)
            elif each.uid not in self.reported:
                self.reported.add(each.uid)
                self.service.journal(now, 'orphan', UNKNOWN.format(each.uid, account))

    def record_seen(self, server, seen: Seen, now: float) -> None:
        """A server that is there: adopt it, and go on from the state that it is in."""
        if server.borrowed and seen.name not in ('', server.name):
            change(Server, server.id, name=seen.name)
        if server.state in UNDER_WAY.values() and not self.arrived(server.state, seen.state):
            stuck = now >= server.called + self.config.call_timeout  # then it is asked once more
            state = (('error' if server.state == 'deleting' else seen.state) if stuck
                     else server.state)
            change(Server, server.id, state=state, due=now if stuck else now + self.config.poll)
        elif server.goal == 'up' and seen.state == 'active':
            if server.state != 'active' or server.addresses != json.dumps(seen.addresses):
                if not server.ready:
                    METRICS.observe('start_delay_seconds', now - server.planned,
                                    cloud=server.account)
                change(Server, server.id, uid=seen.uid, state='active', ready=server.ready or now,
                       fault='', failures=0,
                       addresses=json.dumps(seen.addresses))
                run('UPDATE occurrence SET revision = revision + 1, revised = ? WHERE id = ?',
                    int(now),
                    server.occurrence_id)
                self.look_again(server.occurrence_id, now)
        elif server.goal in ('stop', 'shelve') and self.arrived(UNDER_WAY[server.goal], seen.state):
            change(Server, server.id, uid=seen.uid, state='kept', due=None)
            self.look_again(server.occurrence_id, now)
        elif server.goal == 'up' and seen.state == 'build' and self.too_slow(server):
            late = f'it did not come up within {format_duration(self.config.boot_timeout)}'
            change(Server, server.id, uid=seen.uid, state='error', fault=late, due=now)
            self.look_again(server.occurrence_id, now)
        else:
            later = now + self.config.poll
            known = server.uid and server.state == seen.state  # then its instant is set already
            calls = self.next_call(server._replace(uid=seen.uid, state=seen.state)) != 'look'
            change(Server, server.id, uid=seen.uid, state=seen.state,
                   fault=seen.fault[:500] or server.fault,
                   due=max(server.due or 0, later) if known else now if calls else later)
            if not known:
                self.look_again(server.occurrence_id, now)

    def too_slow(self, server) -> bool:
        """Whether this process has seen a server boot for too long; by a clock that nobody sets."""
        first = self.building[server.account].setdefault((server.id, server.tries),
                                                         time.monotonic())
        return time.monotonic() >= first + self.config.boot_timeout

    def arrived(self, under_way: str, state: str) -> bool:
        """Whether a cloud's state is what was asked for."""
        return state in ARRIVED.get(under_way, ())

    def record_missing(self, server, looked: float, now: float) -> list:
        """A server that the look didn't show: gone, never made, or too new; it, if it vanished."""
        called, due = server.called or 0, server.due or 0
        if server.state == 'planned' or server.intended is not None:
            return []
        if not server.uid and looked < called + self.config.settle:
            soon = now + max(self.config.poll, self.config.retry_first)
            change(Server, server.id, due=min(called + self.config.settle, max(due, soon)))
        elif looked <= called:
            return []
        elif server.goal != 'up':
            change(Server, server.id, state='deleted', deleted=now, due=None)
        elif server.borrowed:
            self.put_off(server, 'the server is not there any more', now, state='unknown')
        elif server.state in ('error', 'deleting') or not server.uid:
            self.write_off(server, now)
            self.put_off(server, server.fault or 'it was never made', now, state='planned',
                         uid=None)
        else:
            self.write_off(server, now)
            change(Server, server.id, state='planned', uid=None,
                   fault='it vanished from the cloud', due=now)
            return [server]
        return []

    def write_off(self, server, now: float) -> None:
        """Keeps a VM that was up and is gone in a row of its own: another takes its place here."""
        if server.ready:
            kept = ('occurrence_id, n, name, account, goal, borrowed, tries, uid, snapshot, '
                    'snapshot_id, planned, begun, ready')
            run(f"INSERT INTO server ({kept}, state, failures, addresses, fault, deleted) "
                f"SELECT {kept}, 'deleted', 0, '[]', '', ? FROM server WHERE id = ?",
                now, server.id)
            change(Server, server.id, begun=None, ready=None)

    def tell_vanished(self, servers: list, now: float) -> None:
        """Tells of the servers of each occurrence that vanished; once, while they come and go."""
        for those in grouped(servers, 'occurrence_id'):
            id = those[0].occurrence_id
            again = row('SELECT up_told FROM occurrence WHERE id = ?', id).up_told is None
            self.note(now, 'vanished', 'these VMs vanished from the cloud with all that was on '
                      f'them, and are made anew: {named(those)}', those[0],
                      None if again else json.loads(those[0].notify))
            change(Occurrence, id, up_told=None)  # so that it is told when they are up
            self.look_again(id, now)


# Document ####################################################################
#
# /openapi.json, OpenAPI 3.1, out of what there is anyway: the marks and signatures of operations,
# the types by which arguments are read, the types of answers, the examples of the help. A schema
# says what `bind` takes, which is more than what is written best: examples show that.

BASE = '/cm/v1.0'
FEEDS = ('/calendar/<secret>/<name>.ics', '/calendar/<secret>.ics')  # programs show the end
METRICS_PATH = '/metrics'
SEED = ('/reservation/add/', '/reservation/delete/')  # older addresses, which name the deed
WITH_BODY = ('POST', 'PATCH')

#: A text without unseen characters, as far as all dialects of patterns can say it.
SEEN = '^[^{}' + UNSEEN.pattern[1:-1].partition('\ud800')[0] + ']*$'
DIGITS = ' *[+-]?[0-9]{1,12} *'
SHORT_LENGTH = {'type': 'string', 'minLength': 2, 'examples': ['2h', '+1d12h', '90m'], 'pattern':
                r'^\+?([0-9]{1,4}w)?([0-9]{1,5}d)?([0-9]{1,6}h)?([0-9]{1,8}m)?([0-9]{1,9}s)?$'}
ISO_LENGTH = {'type': 'string', 'minLength': 3, 'examples': ['PT2H'], 'pattern':
              '^P([0-9]{1,4}W)?([0-9]{1,5}D)?(T([0-9]{1,6}H)?([0-9]{1,8}M)?([0-9]{1,9}S)?)?$'}
LONG_LENGTH = {'type': 'string', 'examples': ['1:30', '2 hours'], 'pattern':
               r'^\+?([0-9]{1,4}:[0-5][0-9]|[0-9]{1,6} (days?|hours?|minutes?|seconds?))$'}
ISO_DATE = '(19[7-9][0-9]|2[01][0-9][0-9])[-/](0[1-9]|1[0-2])[-/](0[1-9]|[12][0-9]|3[01])'
ISO_TIME = {'type': 'string', 'examples': ['2026-12-01T09:00+01:00', '2026-12-01 09:00'], 'pattern':
            f'^{ISO_DATE}([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?'
            '(Z|[+-](0[0-9]|1[0-3]):[0-5][0-9])?)?$'}
SPOKEN_CLOCK = '([01]?[0-9]|2[0-3]):[0-5][0-9]'
SPOKEN_TIME = {'type': 'string', 'examples': ['tomorrow 9:00', '17:00', 'now'], 'pattern':
               '^(now|((today|tomorrow|((next|this) )?(mon|tue|wed|thu|fri|sat|sun)) )?'
               f'{SPOKEN_CLOCK})$'}
NAME = {'type': 'string', 'maxLength': 255, 'pattern': SEEN.format(r'\n\t')}
TEXT = {'type': 'string', 'maxLength': 65535, 'pattern': SEEN.format('')}
LABEL = {'type': 'string', 'not': {'enum': [*NO_LABELS]}, 'examples': ['lab']}
COMMAS = {'type': 'string', 'description': 'with commas between'}


def number_schema(least: int, most: int, **more) -> dict:
    """A number, or its digits: text is what addresses, forms and files have."""
    return {'type': ['integer', 'string'], 'minimum': least, 'maximum': most,
            'pattern': f'^{DIGITS}$'} | more


def list_schema(item: dict, **more) -> dict:
    """Several in a list, or in one text."""
    return {'anyOf': [{'type': 'array', 'items': item, 'maxItems': MOST_PARTS} | more, COMMAS]}


def pairs_schema(letter: str, value: dict, most: int, example: str,
                 never: Iterable[str] = ()) -> dict:
    """Names with values in an object, or in one text."""
    name = {'pattern': f'^{letter}{{1,255}}$'} | ({'not': {'enum': [*never]}} if never else {})
    return {'anyOf': [
        {'type': 'object', 'maxProperties': most, 'propertyNames': name,
         'additionalProperties': value},
        {'type': 'string', 'pattern': f'^({letter}+=[^,]*(,|$))*$', 'examples': [example]}]}


CAPACITY = number_schema(0, 10**12, pattern=f'^({DIGITS}|unlimited)$')
PART = {'type': 'object', 'additionalProperties': False, 'properties': {
    name: number_schema(1, 1_000_000) if kind is Count else NAME
    for name, kind in PART_FIELDS.items()}}

#: What each type of an argument takes, under the name that it has here. A few are in answers too.
SCHEMAS: dict[Any, tuple[str, dict]] = {
    int: ('Integer', number_schema(1 - 2**53, 2**53 - 1)),
    bool: ('Boolean', {'type': ['boolean', 'string'], 'pattern':
                       '^([Tt][Rr][Uu][Ee]|[Yy][Ee][Ss]|1|[Ff][Aa][Ll][Ss][Ee]|[Nn][Oo]|0)$'}),
    Count: ('Count', number_schema(1, 1_000_000)), Page: ('Page', number_schema(1, 10_000)),
    Figure: ('Amount', number_schema(0, 10**12)),
    Most: ('Capacity', CAPACITY),
    Label: ('Label', LABEL | {'pattern': '^[A-Za-z0-9._-]{1,64}$'}),
    NewLabel: ('NewLabel', LABEL | {'pattern': '^[A-Za-z0-9._][A-Za-z0-9._-]{0,63}$'}),
    Place: ('ResourceName', LABEL | {
        'not': {'enum': [each for each in NO_LABELS if each != ANY]},
        'pattern': '^[A-Za-z0-9._-]{1,64}$', 'examples': ['demo', ANY]}),
    Name: ('Name', NAME), Text: ('Text', TEXT), File: ('UserData', TEXT | {'maxLength': 49149}),
    Cursor: ('Cursor', {
        'type': ['string', 'integer'], 'minimum': 0, 'examples': ['2026-12-01T12:00Z/7'],
        'pattern': f'^(([0-9]{{1,10}}[-/])?[0-9]{{1,18}}|{ISO_DATE}.*/[0-9]{{1,18}})$'}),
    Span: ('Length', {'anyOf': [SHORT_LENGTH, ISO_LENGTH, LONG_LENGTH]}),
    When: ('Time', {'anyOf': [ISO_TIME, SPOKEN_TIME, SHORT_LENGTH, ISO_LENGTH]}),
    Day: ('Day', {'anyOf': [ISO_TIME, SPOKEN_TIME, SHORT_LENGTH, ISO_LENGTH]}),
    Names: ('Names', list_schema(NAME, maxItems=100)),
    Pairs: ('Pairs', pairs_schema('[a-zA-Z0-9_:. -]', TEXT | {'maxLength': 255}, 128, 'k=v,k=v')),
    Classes: ('ResourceClasses', pairs_schema('[A-Z0-9_]', CAPACITY, 50, 'CUSTOM_GPU=2', PLAIN)),
    Hosts: ('Hosts', list_schema({'type': 'string', 'pattern': r'^[A-Za-z0-9._\[\],-]{1,255}$'},
                                 minItems=1, examples=[['m01', 'm02']])),
    Parts: ('Parts', list_schema({'anyOf': [{'type': 'string', 'examples': ['gpu:2']}, PART]},
                                 minItems=1)),
    Rows: ('Rows', {'type': 'array', 'minItems': 1, 'maxItems': 100_000, 'items': {
        'type': 'object', 'properties': {'line': {'type': 'integer'}}}}),
    Zone: ('Zone', {'type': 'string', 'pattern': '^([A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*)?$',
                    'maxLength': 64, 'examples': ['Europe/Paris', 'UTC']}),
    Repeat: ('Repetition', {'type': 'string', 'maxLength': 500, 'examples': [
        'weekly on tue,thu', 'weekdays', 'FREQ=WEEKLY;BYDAY=TU']}),
    Clash: ('OnConflict', {'type': 'string', 'pattern': r'^ *(refuse|skip|shift=.+) *$',
                           'examples': ['refuse', 'skip', 'shift=2h']}),
    Ics: ('ICalendar', {'type': 'string', 'maxLength': MOST_ICS}),
    Source: ('ICalendarOrUrl', {'type': 'string', 'maxLength': MOST_ICS}),
    Url: ('Url', {'type': 'string', 'maxLength': 2000, 'pattern': '^(https?|webcals?)://[!-~]+$',
                  'examples': ['https://calendar.example.org/secret/eva.ics']}),
    State: ('State', {'type': 'string', 'enum': [*STATES]}),
    Lasts: ('Lasts', SHORT_LENGTH | {'examples': ['1d2h30m']}),
    Secret: ('Secret', {'type': 'string', 'description': 'shown only now and kept nowhere'})}

#: What answers hold besides.
VALUES: dict[Any, dict] = {
    int: {'type': 'integer'}, float: {'type': 'number'}, str: {'type': 'string'},
    bool: {'type': 'boolean'}, dict: {'type': 'object'}, Any: {}, type(None): {'type': 'null'},
    datetime: {'type': 'string', 'format': 'date-time', 'examples': ['2026-12-01T09:00:00+00:00']}}

#: The words of which an argument is one.
CHOICES = {'role': ROLES, 'at_end': ('', *ENDS), 'mode': ('', 'open', *MODES), 'then': THEN,
           'by_whom': ('project', 'user', 'resource')}

#: Why requests are refused.
REFUSALS = {
    400: 'an argument is missing, malformed or unknown', 401: 'no token, or none in force',
    403: 'the role or the project is too small for it', 404: 'something named is not there',
    409: 'it does not fit, or what it is about is in another state; nothing was changed',
    412: 'somebody has changed it since it was read; nothing was changed',
    413: 'the body is too large',
    422: "the calendar is none, or the Idempotency-Key was another request's",
    429: 'too many requests; try again later', 500: 'a mistake of cmres; its log tells more',
    502: 'a cloud refused or did not answer', 503: 'not now; try again later'}

TAGS = {
    'reservation': 'VMs or capacity of a resource for a time window, once or in a series',
    'server': 'VMs that stay after their end', 'resource': 'what can be reserved',
    'maintenance': 'other capacities for a while', 'limit': 'how much anybody may reserve',
    'calendar': 'calendars that show reservations, and calendars that make them',
    'claim': 'what the scheduler of Nova asks', 'event': 'what happened, when and why',
    'punctuality': 'how late VMs were', 'report': 'sums for operators',
    'check': 'the proof that all adds up', 'token': 'who may ask',
    'user': 'people, whose tokens end', 'service': 'the server itself'}

#: What a request may say in headers, each with an example; and what answers do.
HEADERS = {
    'If-Match': ('the ETag of the reservation that was read', '"417"'),
    'Idempotency-Key': ('a name for this request, so that it is done once; remembered for a day',
                        '0d1f6d3e-8f6c-4d4b-9d34-5f0f2f1a7c11')}
TOLD = {'ETag': 'what If-Match takes; states of VMs do not change it',
        'Location': 'where that is found which was made',
        'Link': 'where the list goes on: rel="next"',
        'Retry-After': 'seconds until it may be tried again', 'WWW-Authenticate': 'Bearer'}

SECURITY = {
    'bearer': {'type': 'http', 'scheme': 'bearer', 'description': 'what `token add` printed'},
    'token': {'type': 'apiKey', 'in': 'header', 'name': 'X-Auth-Token',
              'description': 'the same, as programs of OpenStack send it'},
    'cookie': {'type': 'apiKey', 'in': 'cookie', 'name': 'cmres',
               'description': 'of who has signed in to the page; it only reads'}}
BY_TOKEN = [{'bearer': []}, {'token': []}]
TO_READ = [*BY_TOKEN, {'cookie': []}]


class Document:
    """The parts of /openapi.json; schemas are noted as they are met."""

    def __init__(self):
        self.schemas: dict[str, dict] = {}

    def whole(self) -> dict:
        return {'openapi': '3.1.0', 'info': INFO, 'servers': [{'url': '/'}],
                'security': BY_TOKEN, 'paths': self.paths() | self.other_paths(),
                'tags': [{'name': name, 'description': text} for name, text in TAGS.items()],
                'components': {'responses': self.refusals(), 'securitySchemes': SECURITY,
                               'parameters': {name: header_argument(name) for name in HEADERS},
                               'schemas': self.schemas}}

    def paths(self) -> dict:
        found: dict = defaultdict(dict)
        for operation in API.values():
            for number, (verb, path, fixed) in enumerate(operation.routes):
                entry = self.entry(operation, verb, path, fixed)
                entry['operationId'] += f'_{number}' if number else ''
                found[template(BASE + path)][verb.lower()] = entry
        return found

    def entry(self, operation: Operation, verb: str, path: str, fixed: dict) -> dict:
        """What is said of one verb at one address."""
        fields = {name: each for name, each in operation.parameters.items()
                  if f'<{name}>' not in path and name not in fixed}
        entry = {'operationId': operation.name.strip('_'), 'tags': [path.split('/')[1]],
                 **said_of(operation),
                 'parameters': [*self.in_address(operation, verb, path, fields),
                                *map(header_ref, conditions(operation, verb))],
                 'responses': self.responses(operation, verb, path)}
        if verb in WITH_BODY and fields:
            entry['requestBody'] = self.body(operation, fields)
        if verb == 'GET':
            entry['security'] = TO_READ
        return entry | ({'deprecated': True} if path.startswith(SEED) else {})

    def in_address(self, operation: Operation, verb: str, path: str,
                   fields: dict) -> Iterator[dict]:
        """The arguments in an address, as parts of it or behind it."""
        for name in re.findall(r'<(\w+)>', path):
            yield self.parameter(operation, name, 'path')
        for name in fields if verb not in WITH_BODY or takes_calendar(operation) else ():
            yield self.parameter(operation, name, 'query')

    def parameter(self, operation: Operation, name: str, place: str) -> dict:
        """An argument in an address; lists come as several, or as one with commas."""
        found, example = operation.parameters[name], example_of(operation).get(name)
        listed = place == 'query' and name in several(operation)
        schema = LISTED if listed else self.argument(name, found)
        entry = {'name': name, 'in': place, 'description': WORDS[name], 'schema': schema}
        if example is not None:
            entry['example'] = example.split(',') if listed else example
        needed = found.default is REQUIRED and not takes_calendar(operation)
        return entry | ({'required': True} if place == 'path' or needed else {})

    def body(self, operation: Operation, fields: dict) -> dict:
        """The arguments in a body, as JSON or, of a calendar, as itself."""
        shape = {'type': 'object', 'additionalProperties': False, 'properties': {
            name: self.field(name, each) for name, each in fields.items()}}
        needed = [name for name, each in fields.items()
                  if each.default is REQUIRED and (name, 'part' in fields) != ('resource', True)]
        example = {name: value for name, value in example_of(operation).items() if name in fields}
        content = {'schema': shape | ({'required': needed} if needed else {})}
        if example and example.keys() >= {*needed}:
            content['example'] = example
        kinds = {'application/json': content} | (ICALENDAR if takes_calendar(operation) else {})
        return {'required': bool(needed), 'content': kinds}

    def field(self, name: str, parameter: inspect.Parameter) -> dict:
        """An argument in a body; null is as if it were not given."""
        schema = self.argument(name, parameter)
        if parameter.default is not REQUIRED or name == 'resource':
            schema = {'anyOf': [schema, VALUES[type(None)]]}
        return schema | {'description': WORDS[name]}

    def argument(self, name: str, parameter: inspect.Parameter) -> dict:
        """What an argument takes; one that filters, also what stands for anything."""
        if name in CHOICES:
            return {'type': 'string', 'enum': [*CHOICES[name]]}
        schema = self.ref(*SCHEMAS[parameter.annotation])
        if name in FILTERS and parameter.default is not REQUIRED and parameter.annotation != Name:
            return {'anyOf': [schema, {'type': 'string', 'enum': [ANY]}]}
        return schema

    def ref(self, name: str, schema: dict) -> dict:
        """A schema by its name."""
        self.schemas[name] = schema
        return {'$ref': f'#/components/schemas/{name}'}

    def answer(self, kind) -> dict:
        """What is answered."""
        choices, inside = choices_of(kind), get_args(kind)
        if len(choices) > 1:
            return {'anyOf': [self.answer(each) for each in choices]}
        if get_origin(kind) is list:
            return {'type': 'array', 'items': self.answer(inside[0])}
        if get_origin(kind) is dict:
            return {'type': 'object', 'additionalProperties': self.answer(inside[1])}
        if is_answer(kind):
            return self.ref(kind.__name__.removesuffix('Answer'), self.shape(kind))
        return VALUES[kind] if kind in VALUES else self.ref(*SCHEMAS[kind])

    def shape(self, kind: type[Answer]) -> dict:
        """All fields of an answer."""
        fields = declared(kind)
        always = [name for name, each in fields.items() if each.always]
        return {'type': 'object', 'description': inspect.getdoc(kind),
                'properties': {name: self.answer(each.kind) | meaning(name)
                               for name, each in fields.items()},
                'additionalProperties': self.answer(kind.more) if kind.more else False
                } | ({'required': always} if always else {})

    def responses(self, operation: Operation, verb: str, path: str) -> dict:
        """What can come of a request."""
        kind = operation.answers
        tagged = verb == 'GET' and '<label>' in path and tells_of_reservations(operation)
        told = ['ETag'] * tagged + ['Link'] * ('after' in operation.parameters)
        found = {'200': self.response('done', kind, told)}
        if operation.made:
            found = {'200': self.response('what would be made, of a dry run', kind),
                     '201': self.response('made', kind, ['Location'])}
        return found | self.refused(*statuses_of(operation, verb))

    def response(self, text: str, kind, headers: Iterable[str] = ()) -> dict:
        """An answer of a type, with some headers."""
        told = {name: {'description': TOLD[name], 'schema': VALUES[str]} for name in headers}
        return {'description': text, 'content': {'application/json': {'schema': self.answer(kind)}}
                } | ({'headers': told} if told else {})

    def refused(self, *statuses: int) -> dict:
        return {f'{each}': {'$ref': f'#/components/responses/{refusal_name(each)}'}
                for each in sorted(statuses)}

    def refusals(self) -> dict:
        """The answer of each status that refuses."""
        headers = {401: ['WWW-Authenticate'], 429: ['Retry-After'], 503: ['Retry-After']}
        return {refusal_name(status): self.response(text, RefusalAnswer, headers.get(status, ()))
                for status, text in REFUSALS.items()}

    def other_paths(self) -> dict:
        """The addresses that are no operations."""
        feed = {'200': {'description': 'a calendar', 'content': ICALENDAR},
                '304': {'description': 'as it was'}} | self.refused(404, 429, 500, 503)
        document = {'200': self.response('OpenAPI 3.1', dict)} | self.refused(401, 429, 500, 503)
        health = {'200': self.response('well', HealthAnswer),
                  '503': self.response('not well', HealthAnswer | RefusalAnswer),
                  } | self.refused(429, 500)
        ready = {'200': self.response('ready', ReadyAnswer),
                 '503': self.response('not ready', ReadyAnswer)} | self.refused(429)
        metrics = {'200': {'description': 'metrics', 'content': {'text/plain': {
            'schema': VALUES[str]}}}} | self.refused(401, 403, 404, 429, 500, 503)
        feeds = {path: (f'feed_{n}' if n else 'feed', 'Shows reservations to calendar programs',
                        feed, []) for n, path in enumerate(FEEDS)}
        found = {'/healthz': ('healthz', 'Tells whether the store can be read', health, []),
                 '/readyz': ('readyz', 'Tells whether requests can be answered', ready, []),
                 METRICS_PATH: ('metrics', 'Tells Prometheus of all that is counted', metrics,
                                BY_TOKEN),
                 '/openapi.json': ('openapi', 'Describes all addresses', document, TO_READ),
                 **feeds}
        return {template(path): {'get': plain_entry(path, *said)} for path, said in found.items()}


INFO = {'title': 'cmres', 'version': __version__, 'description': __doc__.partition('\n')[0],
        'license': {'name': 'Apache License 2.0', 'identifier': 'Apache-2.0'}}
ICALENDAR = {'text/calendar': {'schema': {'type': 'string'}}}
LISTED = {'type': 'array', 'items': {'type': 'string'}, 'maxItems': 100,
          'description': 'one by one, or with commas between'}


def plain_entry(path: str, name: str, text: str, responses: dict, security: list) -> dict:
    """An address that only answers."""
    return {'operationId': name, 'tags': ['service'], 'summary': text, 'description': f'{text}.',
            'security': security, 'responses': responses, 'parameters': [
                {'name': each, 'in': 'path', 'required': True, 'description': f'its {each}',
                 'schema': {'type': 'string', 'pattern': '^[!-.0-~]+$'}}
                for each in re.findall(r'<(\w+)>', path)]}


def header_argument(name: str) -> dict:
    """A header of a request."""
    text, example = HEADERS[name]
    return {'name': name, 'in': 'header', 'description': text, 'example': example,
            'schema': {'type': 'string', 'pattern': '^[!-~]{1,255}$'}}


def meaning(field: str) -> dict:
    return {'description': MEANS[field]} if field in MEANS else {}


def header_ref(name: str) -> dict:
    return {'$ref': f'#/components/parameters/{name}'}


@functools.cache
def openapi() -> dict:
    """OpenAPI 3.1 of all that is answered."""
    return Document().whole()


def template(path: str) -> str:
    """An address as OpenAPI writes it."""
    return re.sub(r'<(\w+)>', r'{\1}', path).rstrip('/')


def refusal_name(status: int) -> str:
    """The kind of error with a status: its first."""
    return next(name for name, kind in ERRORS.items() if kind.status == status)


def said_of(operation: Operation) -> dict:
    """What its help says of an operation, for who types nothing."""
    summary, _, more = re.sub(r'\n\n(Example|Args):.*', '', inspect.getdoc(operation.method),
                              flags=re.S).partition('\n\n')
    return {'summary': summary.rstrip('.').replace('\n', ' '), 'description': more or summary}


def example_of(operation: Operation) -> dict:
    """The arguments of the first command in the help of an operation."""
    import shlex
    found = re.search(r'Example:\n\s*python cmres.py (.*)', inspect.getdoc(operation.method))
    words = shlex.split(found[1])[len(operation.words.split()):]
    plain = [*itertools.takewhile(lambda word: not word.startswith('--'), words)]
    example = dict(zip(operation.parameters, plain))
    options = [*words[len(plain):], '--']
    for word, value in zip(options, options[1:]):
        if word.startswith('--'):
            example[word[2:].replace('-', '_')] = True if value.startswith('--') else value
    taken = {name for name, each in operation.parameters.items()
             if each.annotation not in FROM_FILES}
    return {name: value for name, value in example.items() if name in taken}


#: What stands for a file on the command line.
FROM_FILES = (File, Rows, Ics, Source)


def takes_calendar(operation: Operation) -> bool:
    """Whether a calendar may be its body: then other arguments stand in the address."""
    return any(each.annotation is Ics for each in operation.parameters.values())


def several(operation: Operation) -> set[str]:
    """The arguments that take several values, with commas between or each on its own."""
    return {name for name, each in operation.parameters.items()
            if each.annotation in (Names, Hosts, Parts)}


def conditions(operation: Operation, verb: str) -> list[str]:
    """The headers on which it may be made to depend."""
    of_one = operation.changes and is_about_one(operation)
    return ['If-Match'] * of_one + ['Idempotency-Key'] * (verb == 'POST')


def is_about_one(operation: Operation) -> bool:
    """Whether an address of it names the reservation that it is about."""
    return any(path.startswith('/reservation/<label>') for _, path, _ in operation.routes)


def tells_of_reservations(operation: Operation) -> bool:
    """Whether a reservation is what it answers, or a list of them."""
    kinds = [one for each in choices_of(operation.answers) for one in get_args(each) or (each,)]
    return any(is_answer(each) and issubclass(each, ReservationAnswer) for each in kinds)


def statuses_of(operation: Operation, verb: str) -> set[int]:
    """The statuses with which it may be refused."""
    kinds = {each.annotation for each in operation.parameters.values()}
    names = operation.parameters.keys()
    found = {400: True, 401: True, 429: True, 500: True, 503: True,
             403: operation.changes or operation.role != READER,
             404: bool(kinds & {Label, Place, Name}) or 'id' in names,
             409: operation.changes or 'label' in names,
             412: 'If-Match' in conditions(operation, verb), 413: verb in WITH_BODY,
             422: verb == 'POST' or Source in kinds,
             502: bool(names & {*CLOUDY, 'aggregates'})}
    return {status for status, there in found.items() if there}


# REST ########################################################################
#
# Routes come from the marks of the service. One wrapper reads, calls and answers; it and the
# error handler below it are the only places that know statuses. All answers are JSON.
#
# A request may say on what it depends: If-Match, the state of a reservation that it has seen, and
# Idempotency-Key, that it was not done before. Both are looked at in the transaction that does it.

MOST_BODY = 2**20  # bytes
LATE = 60  # seconds without a pass after which a life cycle is taken for broken
LEAST_GZIP = 1000  # bytes of an answer below which compressing it is in vain
#: Of every answer that is no page.
UNKEPT = {'Content-Type': 'application/json', 'Cache-Control': 'no-store',
         'X-Content-Type-Options': 'nosniff', 'Vary': 'Accept-Encoding'}


def rest(service: Reservations, told: Callable | None = None, visitor: Callable | None = None):
    """The WSGI application that answers for a service.

    Args:
      told: words what never reaches one of its handlers
      visitor: tells who is signed in to the page, by the cookie of a request
    """
    app = health_of(service, told)
    for operation in API.values():
        for verb, path, fixed in operation.routes:
            app.route(rule(operation, path), verb, handler(service, operation, fixed, visitor))
    for path in FEEDS:
        app.route(path, 'GET', feed_handler(service))
    app.route('/openapi.json', 'GET', document_handler(service, visitor))
    return app


def health_of(service: Reservations, told: Callable | None = None):
    """The WSGI application that tells how a service is, and nothing else."""
    import bottle
    app = bottle.Bottle()
    app.uninstall('json')  # it knows neither lists nor instants
    app.default_error_handler = told or (
        lambda failure: error_text(failure, bottle.request, bottle.response))
    app.install(answering)
    app.add_hook('before_request', lambda: plain_path(bottle.request.environ))
    app.add_hook('after_request', lambda: name_request(bottle.request, bottle.response))
    app.route('/healthz', 'GET', health_handler(service))
    app.route('/readyz', 'GET', Readiness(service).answer, skip=[answering])
    app.route(METRICS_PATH, 'GET', no_metrics)
    return app


def no_metrics():
    """What is answered where no gate is before the application."""
    return refused(NotFound('`serve` counts, and only there are metrics'))


def rule(operation: Operation, path: str) -> str:
    """An address as bottle takes it: where a number must be, a word is of another address."""
    for name, each in operation.parameters.items():
        if each.annotation is int:
            path = path.replace(f'<{name}>', f'<{name}:re:[+-]?[0-9]+>')
    return (BASE + path).rstrip('/')


def handler(service: Reservations, operation: Operation, fixed: dict,
            visitor: Callable | None) -> Callable:
    """Answers one address: who asks, what is asked, the call, its answer in JSON."""
    import bottle

    def handle(**path):
        request = bottle.request
        try:
            acting = service.acting(who_asks(service, request, visitor))
            acting.wanted = while_there(request.environ)
            with acting.shares.answering(acting.actor.user), at_length(acting, operation):
                given = given_once(read_query(request, several(operation)),
                                   read_body(request, most_body(operation)), path, fixed)
                bound = bind(operation, given, acting.here)
                return respond(acting, operation, bound, request, given)
        except Error as error:
            return refused(error)
    return handle


def at_length(acting: Reservations, operation: Operation):
    """What bounds a request whose body alone takes long to read, before it is read."""
    return acting.shares.computing() if operation.name in LONG else nullcontext()


def document_handler(service: Reservations, visitor: Callable | None) -> Callable:
    """Answers with the description of all that is here, for who may ask for any of it."""
    import bottle

    def handle():
        try:
            who_asks(service, bottle.request, visitor)
            return sent(json_text(openapi()), 200, UNKEPT)
        except Error as error:
            return refused(error)
    return handle


def respond(acting: Reservations, operation: Operation, bound: dict, request, given: dict):
    """The answer to a call on the conditions of its request."""
    once = once_of(acting, operation, bound, request, given)
    if once and (kept := once.kept()):
        return sent(kept.answer, kept.status, UNKEPT | {'Idempotency-Replayed': 'true'})
    state = unchanged(acting, operation, bound, request)
    acting.fence = in_turn(acting.fence, state, once and once.claim)
    # The tag is of before what it tells of is read: it may be too old, never too new.
    tag = tag_for(acting, operation, bound)
    with once or nullcontext():
        answer = getattr(acting, operation.name)(**bound)
    status = 201 if operation.made and not bound.get('dry_run') else 200
    text = json_text(answer)
    if once:
        once.keep(status, text)
    headers = {'ETag': tag, 'Location': location(operation, answer) if status == 201 else '',
               'Link': next_page(operation, answer, request)}
    return sent(text, status, UNKEPT | {name: each for name, each in headers.items() if each})


def in_turn(*looks: Callable | None) -> Callable:
    """Calls several, as far as they are there, once in each transaction."""
    seen = ''

    def look():
        nonlocal seen
        now = db.top_transaction()
        for each in filter(None, looks if now is not seen else ()):
            each()
        seen = now
    return look


def sent(text: str | bytes, status: int, headers: dict):
    """An answer, compressed for who takes that: never a page, which holds secrets (BREACH)."""
    import bottle
    import gzip
    data = text if isinstance(text, bytes) else text.encode('utf8', 'replace')
    takes = header(bottle.request, 'Accept-Encoding')
    if len(data) >= LEAST_GZIP and TAKES_GZIP.search(takes):
        data = gzip.compress(data, 5, mtime=0)
        headers = headers | {'Content-Encoding': 'gzip'}
    return bottle.HTTPResponse(data, status, headers)


TAKES_GZIP = re.compile(r'(?:^|[,\s])gzip(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))')


def header(request, name: str, default: str | None = '') -> str | None:
    """A header of a request, whatever bytes it has: bottle's own reader wants UTF-8."""
    return request.environ.get(f"HTTP_{name.upper().replace('-', '_')}", default)


def refused(error: Error):
    """The answer that says why something is not done."""
    return sent(json_text(error_body(error)), error.status, UNKEPT | headers_of(error))


def headers_of(error: Error) -> dict[str, str]:
    """What an error says in headers: how to ask, or when again."""
    if error.status in (429, 503):
        seconds = float(error.details.get('retry_after') or RETRY)
        return {'Retry-After': f'{math.ceil(seconds)}'}
    return {'WWW-Authenticate': 'Bearer'} if error.status == 401 else {}


def location(operation: Operation, answer: dict) -> str:
    """Where that is found which was made."""
    return BASE + re.sub(r'<(\w+)>', lambda part: quote(answer[part[1]], safe=''), operation.made)


def next_page(operation: Operation, answer, request) -> str:
    """The link to what follows a page of a list; the last page is the one without a line."""
    if 'after' not in operation.parameters or not answer or 'id' not in answer[-1]:
        return ''
    query = [each for each in parse_qsl(request.query_string) if each[0] != 'after']
    more = urlencode([*query, ('after', cursor_of(answer[-1]))])
    return f'<{quote(request.path)}?{more}>; rel="next"'


def cursor_of(line: dict) -> str:
    """What `after` takes to go on behind a line of a list."""
    return f"{int(line['start'].timestamp())}-{line['id']}" if 'start' in line else f"{line['id']}"


# What a request depends on.


def tag_for(acting: Reservations, operation: Operation, bound: dict) -> str:
    """The ETag of a reservation that is read; of anything else none."""
    if operation.changes or not bound.get('label') or not tells_of_reservations(operation):
        return ''
    return tag_of(acting, bound)


def tag_of(acting: Reservations, bound: dict) -> str:
    """An ETag of what people did to a reservation: it stays while only its VMs change."""
    newest = acting.look.newest_deed(bound['label'], bound.get('project', ''))
    return f'"{newest}"' if newest else ''


def unchanged(acting: Reservations, operation: Operation, bound: dict, request) -> Callable | None:
    """What refuses a change that was meant for another state (RFC 9110, 13.1.1)."""
    wanted = header(request, 'If-Match', '*')
    if wanted.strip() == '*' or not bound.get('label') or not is_about_one(operation):
        return None

    def look():
        tag = tag_of(acting, bound)
        if tag and tag not in [each.strip() for each in wanted.split(',')]:
            raise Changed(f"'{bound['label']}' was changed since you read it. Nothing was done. "
                          'Read it again, then change it', etag=tag)
    return look


def once_of(acting: Reservations, operation: Operation, bound: dict, request,
            given: dict) -> Once | None:
    """The key of a POST that has one; a dry run keeps nothing, not even that."""
    key = header(request, 'Idempotency-Key', None)
    if key is None or request.method != 'POST' or bound.get('dry_run'):
        return None
    if not re.fullmatch('[!-~]{1,255}', key):
        raise Invalid('Idempotency-Key: 1 to 255 letters, digits and signs are needed, such as '
                      'a UUID')
    asked = json.dumps([operation.name, given], sort_keys=True, default=str)
    return Once(acting, key, hashed(asked), not has_secret(operation.answers))


def has_secret(kind) -> bool:
    """Whether an answer has a field that is shown once and kept nowhere."""
    return is_answer(kind) and any(each.kind is Secret for each in declared(kind).values())


class Once:
    """What a request with an Idempotency-Key does is done once: its key is written with it.

    The answer is kept for a day, unless it is long or holds a secret. A refusal is not: the
    request may be sent again.
    """
    LASTS = 86400  # seconds
    MOST = 65536   # characters of an answer

    def __init__(self, acting: Reservations, key: str, digest: str, keeps: bool):
        self.digest, self.keeps = digest, keeps
        self.now = int(acting.clock())
        self.whose = (acting.actor.user, acting.actor.project, key)
        self.mark = secrets.token_hex(8)  # tells ours from that of a request beside this one

    def __enter__(self) -> Once:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error and self.row():
            self.run('DELETE FROM once')

    def row(self):
        return row('SELECT digest, mark, status, answer FROM once '
                   'WHERE user = ? AND project = ? AND key = ? AND at > ?',
                   *self.whose, self.now - self.LASTS)

    def kept(self):
        """The status and answer of the same request before; None if there was none.

        Raises:
          KeyReused: it was another request.
          Conflict: its answer is not there, or not yet.
        """
        found = self.row()
        if found and found.digest != self.digest:
            raise KeyReused('another request had this Idempotency-Key: take a new key for each')
        if found and not found.answer:
            raise Conflict('a request with this Idempotency-Key was done or is being done, and '
                           'its answer is not there: ask for what it made')
        return found

    def claim(self) -> None:
        """Writes the key in the transaction of what is done.

        Raises:
          Conflict: another request was faster.
        """
        if rehearsal.on:
            return
        found = self.row()
        if found and found.mark != self.mark:
            self.kept()
            raise Conflict('the first request with this Idempotency-Key has just been done: '
                           'send it again')
        if not found:
            run('DELETE FROM once WHERE at <= ?', self.now - self.LASTS)
            run('INSERT INTO once (user, project, key, digest, mark, at, status, answer) '
                "VALUES (?, ?, ?, ?, ?, ?, 0, '')", *self.whose, self.digest, self.mark, self.now)

    def keep(self, status: int, text: str) -> None:
        """Keeps an answer for who asks again."""
        if self.keeps and len(text) <= self.MOST:
            self.run('UPDATE once SET status = ?, answer = ?', status, text)

    def run(self, deed: str, *values) -> None:
        """Does something to the row that this request has written."""
        with transaction():
            run(f'{deed} WHERE user = ? AND project = ? AND key = ? AND mark = ?',
                *values, *self.whose, self.mark)


def feed_handler(service: Reservations) -> Callable:
    """Answers calendar programs: nothing but a secret in the address tells who asks."""
    import bottle
    written = WrittenFeeds(service)

    def handle(secret: str, name: str = ''):
        try:
            etag, text = written.current(secret)
        except Error as error:
            return refused(error)
        same = etag in header(bottle.request, 'If-None-Match')
        return sent(b'' if same else text, 304 if same else 200, UNKEPT | {
            'Content-Type': 'text/calendar; charset=utf-8', 'ETag': etag,
            'Cache-Control': 'private, no-cache'})
    return handle


class Written(NamedTuple):
    """A feed as it was written, with what tells whether it still holds."""
    newest: int | None = None  # the last event of the event log then
    digest: str | None = None  # of what it shows
    holds: float = 0           # until when, if nothing changes
    etag: str = ''
    text: bytes = b''


class WrittenFeeds:
    """The feeds that were asked for last, each written once for all who ask.

    One is written at a time: a long one takes memory. While half of the threads wait for that,
    others are told to come again.
    """
    MOST = 2**26  # bytes of all that are kept

    def __init__(self, service: Reservations):
        self.service, self.kept = service, {}
        self.lock = threading.Lock()
        self.places = threading.BoundedSemaphore(max(service.config.threads // 2, 1))

    def current(self, secret: str) -> tuple[str, bytes]:
        """The ETag and the text of a feed as it is now."""
        name, feed = self.service.feed(secret)
        found = self.kept.get(feed.id, Written())
        if self.is_old(found):
            if not self.places.acquire(blocking=False):
                raise Unavailable('many calendars are being written; try again in a minute')
            try:
                with self.lock:
                    found = self.written_anew(name, feed)
            finally:
                self.places.release()
        return found.etag, found.text

    def size(self) -> int:
        return sum(len(each.text) for each in self.kept.values())

    def newest(self) -> int | None:
        return row('SELECT max(id) AS newest FROM event').newest

    def is_old(self, found: Written) -> bool:
        return found.newest != self.newest() or self.service.clock() >= found.holds

    def written_anew(self, name: str, feed) -> Written:
        """The feed as it is now; somebody else may have written it meanwhile."""
        found, newest = self.kept.get(feed.id, Written()), self.newest()
        if not self.is_old(found):
            return found
        digest = self.service.feed_digest(feed)
        if digest != found.digest or self.service.clock() >= found.holds:
            events, holds = self.service.feed_events(feed)
            text = calendar_text(name, events).encode()
            found = Written(newest, digest, holds, f'"{hashlib.sha256(text).hexdigest()[:32]}"',
                            text)
        self.kept.pop(feed.id, None)
        while self.kept and self.size() + len(found.text) > self.MOST:
            del self.kept[next(iter(self.kept))]
        self.kept[feed.id] = found = found._replace(newest=newest)
        return found


def answering(handle: Callable) -> Callable:
    """A handler that is not asked while the store is lost, and whose failures are told."""
    import bottle

    def answer(*args, **path):
        try:
            store_file.check()
            return handle(*args, **path)
        except bottle.HTTPResponse:
            raise
        except Exception as error:
            refusal = error if isinstance(error, Error) else trouble(error)
            refusal = refusal or mistake(error, bottle.request)
            return bottle.HTTPError(refusal.status, refusal)
    return answer


def mistake(error: Exception, request) -> Error:
    """What is said of a mistake of ours: where the log has all of it."""
    id = secrets.token_hex(4)
    log.error('%s: %s %s failed', id, request.method, request.path, exc_info=error)
    return Error(f'cmres made a mistake. Please tell an admin this number: {id}. It is in the log '
                 'of the server', id=id)


def health_handler(service: Reservations) -> Callable:
    """Says whether the store can be read and the life cycle goes on; the address needs no token."""

    def handle():
        row('SELECT 1 AS one')
        age = service.age() if service.age else 0
        status, body = 200, {'status': 'ok'} | ({'last_pass': round(age, 1)} if service.age else {})
        if age > LATE:
            status, body = 503, {'last_pass': round(age, 1),
                                 'error': 'no VM was started or ended for '
                                 f'{format_duration(age)}; the log of this server says why'}
        return sent(json_text(body), status, UNKEPT)
    return handle


class Line:
    """Requests that wait for a thread: next is one of whom the fewest are being answered.

    Nobody has more than an equal share of the threads, counted with one who may come next. So who
    sends many at once waits for their own, and who sends the first finds a thread free.

    Args:
      threads: how many there are
      call: wakes one of them; `waitress` calls all of this under a lock of its own
    """

    def __init__(self, threads: int, call: Callable[[], None]):
        self.threads, self.call = threads, call
        self.waiting: list[tuple] = []         # whose, what `waitress` serves
        self.answered: dict[int, str] = {}     # by thread, whose

    def __len__(self):
        return len(self.waiting)

    def __bool__(self):
        """Whether there is something to do for this thread, which has done what it had."""
        self.answered.pop(threading.get_ident(), None)
        return self.next() is not None

    def next(self) -> tuple | None:
        """What is to be answered next, if any of it may be now."""
        under_way = Counter(self.answered.values())
        everybody = {name for name, _ in self.waiting} | {*under_way}
        share = max(self.threads // (len(everybody) + 1), 1)
        first = min(self.waiting, key=lambda each: under_way[each[0]], default=None)
        return first if first and under_way[first[0]] < share else None

    def append(self, channel) -> None:
        self.waiting.append((whose(channel), channel))

    def popleft(self):
        """What this thread answers next."""
        name, channel = next_ = self.next()
        self.waiting.remove(next_)
        self.answered[threading.get_ident()] = name
        if self.next():
            self.call()
        return channel


def whose(channel) -> str:
    """Who sends the request that a connection has: by their token or session, else from where."""
    headers = channel.requests[0].headers if channel.requests else {}
    return headers.get('AUTHORIZATION') or headers.get('COOKIE') or str(channel.addr)


def fair_dispatcher(threads: int):
    """The threads of `waitress`, with a line of ours before them."""
    from waitress.task import ThreadedTaskDispatcher
    made = ThreadedTaskDispatcher()
    made.queue = Line(threads, made.queue_cv.notify)
    made.set_thread_count(threads)
    return made


def disk_free(path: str) -> int:
    """The free bytes on the disk of a file, for who isn't root; 0 where that can't be told."""
    import shutil
    try:
        return shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    except OSError:
        return 0


class Readiness:
    """Tells whether the store can be written and is whole, and the life cycle makes its passes.

    It needs no token; whoever asks often gets the answer of the second before.
    """

    def __init__(self, service: Reservations):
        self.service, self.lock = service, threading.Lock()
        self.until, self.found, self.troubles = 0.0, {}, 0

    def answer(self):
        with self.lock:
            with suppress(Unavailable):
                store_file.look()
            if time.monotonic() >= self.until or store_file.troubles != self.troubles:
                self.troubles = store_file.troubles
                self.found, self.until = self.look_safely(), time.monotonic() + 1
            found = self.found
        return sent(json_text(found), 200 if found['status'] == 'ready' else 503, UNKEPT)

    def look_safely(self) -> dict:
        """What is so now, also where that can't be read."""
        try:
            return self.look()
        except (Unavailable, *STORE_ERRORS) as error:
            return {'status': 'not ready', 'store': {'fault': str(trouble(error) or error)}}

    def look(self) -> dict:
        """What is so now: each part with a fault, if it has one."""
        failed, at = store_file.failed  # on a disk that is nearly full, small writes go on
        fault = probe(store_file.path) or failed * (time.monotonic() < at + 5)
        store = {'fault': fault, 'version': latest_version()}
        found = {'store': store, 'integrity': self.integrity(store['fault']), 'disk': self.disk(),
                 'scheduler': {} if store['fault'] else self.scheduler()}
        ready = not any(each.get('fault') for each in found.values())
        return {'status': 'ready' if ready else 'not ready'} | {
            name: {key: value for key, value in each.items() if value != ''}
            for name, each in found.items()}

    def disk(self) -> dict:
        """How much space the database has left."""
        config = self.service.config
        free, most = disk_free(config.database) // 2**20, config.min_disk
        fault = (f'only {free} MiB are free on the disk of the database; {most} are to be kept '
                 '(min_disk)')
        return {'free_mib': free, 'fault': fault if free < most else ''}

    def integrity(self, fault: str) -> dict:
        """What the last check of the file found; a new one, where damage was met since."""
        if store_file.damage and not fault and not (damage := look_for_damage(store_file.path)):
            with transaction():
                note_check(self.service.clock(), damage)
        last = {} if fault else json.loads(fact('checked') or '{}')
        checked = {'checked': instant(last['at'])} if last else {}
        return checked | {'fault': store_file.damage or (
            DAMAGED.format(last['result']) if last and last['result'] != 'ok' else '')}

    def scheduler(self) -> dict:
        """How long ago a scheduler renewed its right to act, which it does in its passes."""
        found, most = row('SELECT until FROM lease'), self.service.config.max_pass_age
        if not found:
            return {'fault': 'no scheduler has run yet: start `serve` or `scheduler`'}
        age = round(max(self.service.clock() - found.until + self.service.config.lease, 0), 1)
        late = (f'the last pass was {format_duration(int(age))} ago: start `serve` or `scheduler`, '
                'or look at its log')
        return {'last_pass': age, 'fault': late if age > most else ''}


RETRY = 60  # seconds after which somebody may try again, where nothing better is known


def note_wait(environ: dict, error: Error) -> None:
    """Notes of a request that is refused when it may be sent again."""
    environ['cmres.retry_after'] = error.details.get('retry_after', RETRY)


def error_body(error: Error) -> dict:
    METRICS.count('refusals_total', kind=type(error).__name__)
    return {'error': str(error),
            'kind': type(error).__name__} | ({'details': error.details} if error.details else {})


def error_text(failure, request, response) -> str:
    """The JSON of what never reached a handler: no such address, wrong verb, a bug."""
    for name, value in UNKEPT.items():
        response.set_header(name, value)
    if failure.status_code == 405:
        return wrong_verb(failure, request, response)
    error = failure.body
    if failure.status_code == 500 and not isinstance(error, Error):
        error = mistake(failure.exception, request)
    if failure.status_code == 404 and not isinstance(error, Error):
        error = NotFound(f'there is nothing at {request.path}; /openapi.json lists all addresses')
    if not isinstance(error, Error):
        error = Invalid(f'{error}'.lower())
    for name, value in headers_of(error).items():
        response.set_header(name, value)
    return json_text(error_body(error))


def wrong_verb(failure, request, response) -> str:
    """What is said of the verbs of an address: to who asks for them, and to who took another."""
    verbs = set(failure.headers['Allow'].split(',')) - {'PROXY'}
    verbs = sorted(verbs | {'OPTIONS'} | ({'HEAD'} if 'GET' in verbs else set()))
    response.set_header('Allow', ', '.join(verbs))
    if request.method == 'OPTIONS':
        response.status = 204
        return ''
    use = ' or '.join(each for each in verbs if each not in ('HEAD', 'OPTIONS'))
    return json_text(error_body(Error(f'{request.method} is not for this address; use {use}')))


def request_name(environ: dict) -> str:
    """The name that a request came with, or a new one."""
    import uuid
    name = environ.get('HTTP_X_REQUEST_ID', '')
    return name if re.fullmatch('[A-Za-z0-9._-]{1,64}', name) else f'req-{uuid.uuid4()}'


def name_request(request, response) -> None:
    """Gives an answer the name that its request came with, or a new one."""
    name = request.environ.get('cmres.request_id') or request_name(request.environ)
    for header in ('X-Request-Id', 'X-Openstack-Request-Id'):
        response.set_header(header, name)


def plain_path(environ: dict) -> None:
    """The address without its last slash; refuses one that is not UTF-8."""
    import bottle
    try:
        environ['bottle.raw_path'].encode('latin1').decode('utf8')
    except UnicodeDecodeError:
        raise bottle.HTTPError(400, 'the address is not UTF-8') from None
    environ['PATH_INFO'] = environ['PATH_INFO'].rstrip('/') or '/'


def who_asks(service: Reservations, request, visitor: Callable | None = None) -> Actor:
    """Whose token a request has; who only reads may have signed in to the page instead."""
    secret = bearer(request)
    if not secret and visitor and request.method in ('GET', 'HEAD') and (actor := visitor(request)):
        return actor
    if not secret:
        raise Unauthorized('a token is needed: Authorization: Bearer TOKEN; an admin makes one '
                           'with: token add USER')
    try:
        found = token_of(secret, service.clock())
    except Unauthorized:
        note_wrong(service, request.environ)
        raise
    note_caller(service, request.environ, found)
    return bearer_of(found)


def note_caller(service: Reservations, environ: dict, found) -> None:
    """Notes of a request who sends it; TooMany if they do so too often."""
    environ['cmres.token'] = found
    service.shares.uses.note(found.id, service.clock())
    if found.role != ADMIN:  # theirs are the programs of the operator, such as Nova's filter
        name = f'{found.project}/{found.user}'
        service.shares.rates.take('requests_per_user', name)
        service.shares.rates.look('mib_per_user', name)


def note_wrong(service: Reservations, environ: dict) -> None:
    """Notes a wrong token of an address; TooMany if many come from there."""
    address = environ.get('cmres.address', '')
    METRICS.count('wrong_tokens_total')
    service.shares.wrong[address] += 1
    service.shares.rates.take('wrong_tokens', address)


def while_there(environ: dict) -> Callable[[], None]:
    """What is asked before a change is written: whether its client has hung up meanwhile."""
    gone = environ.get('waitress.client_disconnected', lambda: False)

    def check() -> None:
        if gone():
            METRICS.count('hung_up_total')
            raise Unavailable('the client has hung up, so nothing was changed')
    return check


def bearer(request) -> str:
    """The token of a request; '' without one."""
    scheme, _, token = header(request, 'Authorization').partition(' ')
    token = token if scheme.lower() == 'bearer' else ''
    return (token or header(request, 'X-Auth-Token')).strip()


def read_query(request, several: Iterable[str] = ()) -> dict:
    """The fields of an address, each once."""
    return fields_of(request.query_string.encode(), 'query', several)


def fields_of(text: bytes, what: str, several: Iterable[str] = ()) -> dict:
    """The fields of a query or of a form.

    Args:
      several: those that may come more than once

    Raises:
      Invalid: they are not UTF-8, too many, or given twice with two values.
    """
    try:
        pairs = parse_qsl(text.decode(), keep_blank_values=True, errors='strict',
                          max_num_fields=100)
    except (UnicodeDecodeError, ValueError):
        raise Invalid(f'the {what} is not UTF-8 or has more than 100 fields') from None
    lists = {each: ','.join(value for name, value in pairs if name == each)
             for each in several if any(name == each for name, _ in pairs)}
    return lists | given_once(*({name: value} for name, value in pairs if name not in lists))


def whole_body(request, most: int = MOST_BODY) -> bytes:
    """The body of a request; TooLarge if it has more than `most` bytes."""
    if (request.content_length or 0) > most or len(body := request.body.read(most + 1)) > most:
        raise TooLarge(f'the body is larger than {most} bytes; send it in parts')
    return body


def most_body(operation: Operation) -> int:
    """How many bytes its body may have: a calendar in JSON is longer than in a file."""
    return 2 * MOST_ICS if takes_calendar(operation) else MOST_BODY


def read_body(request, most: int) -> dict:
    text = whole_body(request, most)
    if not text.strip():
        return {}
    if request.content_type.partition(';')[0].strip().lower() == 'text/calendar':
        return {'file': text.decode('utf8', 'surrogateescape')}
    try:
        body = json.loads(text.decode('utf8'),
                          object_pairs_hook=lambda pairs: given_once(*({k: v} for k, v in pairs)))
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError:
        raise Invalid('the body is not UTF-8') from None
    except (ValueError, RecursionError) as error:
        raise Invalid(f'the body is not JSON: {error}') from None
    if not isinstance(body, dict):
        raise Invalid(f'the body must be a JSON object such as {{"label": "lab"}}, not '
                      f'{shown(body)}')
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


# Gate ########################################################################
#
# What stands before REST and the page: whose address a request is from, whether it asks too often,
# what is counted, and its line in the log. It never sees what is asked, and writes no address that
# could be a secret.

PROMETHEUS = 'text/plain; version=0.0.4; charset=utf-8'
QUIET = ('/healthz', '/readyz', METRICS_PATH)  # programs ask for them all the time
#: Where proxies tell of their clients; nobody behind this gate reads it.
FORWARDED = ('HTTP_X_FORWARDED_FOR', 'HTTP_X_FORWARDED_HOST', 'HTTP_X_FORWARDED_PROTO',
             'HTTP_X_FORWARDED_PORT', 'HTTP_X_FORWARDED_BY', 'HTTP_FORWARDED')
END_IS_NEAR = 14 * DAY  # then answers tell that a token ends


class Gate:
    """The WSGI application before that of a service; `cycle` is the life cycle of this process."""

    def __init__(self, app: Callable, service: Reservations, cycle: LifeCycle | None = None):
        self.app, self.service, self.cycle = app, service, cycle
        self.operations = {(verb, rule(operation, path)): operation.name
                           for operation in API.values() for verb, path, _ in operation.routes}
        self.store = StoreMetrics(service, cycle)
        self.reader = ''  # the hash of the token that has read metrics last

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        began, answer = time.monotonic(), Reply(environ, start_response)
        environ['cmres.address'] = address = self.address(environ)
        environ['cmres.began'] = began
        environ['cmres.request_id'] = request_name(environ)
        try:
            self.service.shares.rates.take('requests_per_address', address)
            self.service.shares.rates.look('mib_per_address', address)
            reads = environ['REQUEST_METHOD'] in ('GET', 'HEAD')
            if reads and environ['PATH_INFO'] == METRICS_PATH:
                body = self.metrics(environ, answer)
            else:
                body = self.app(environ, answer.begin)
        except Error as error:
            body = answer.refuse(error)
        return Counting(body, lambda sent: self.finish(environ, answer, began, sent))

    def address(self, environ: dict) -> str:
        """Who asks, for limits and the log: the peer, or what a trusted proxy says last."""
        peer = environ.get('REMOTE_ADDR', '')
        said = environ.get('HTTP_X_FORWARDED_FOR', '').rpartition(',')[2].strip()
        for name in FORWARDED:
            environ.pop(name, None)
        trusted = said and self.service.config.is_proxy(peer)
        return network_of(said) or network_of(peer) if trusted else network_of(peer)

    def metrics(self, environ: dict, answer: Reply) -> Iterable[bytes]:
        """What Prometheus reads.

        Raises:
          NotFound: the operator wants none.
          Forbidden: it needs the token of an admin.
        """
        allowed = self.service.config.metrics
        if allowed == 'off':
            raise NotFound('there are no metrics here; the setting `metrics` can allow them')
        if allowed != 'open':
            self.refuse_reader(environ)
        text = exposition(self.store.samples()).encode()
        return answer.say(200, text, UNKEPT | {'Content-Type': PROMETHEUS})

    def refuse_reader(self, environ: dict) -> None:
        """Refuses who may not read metrics; who could before, may while the store can't be read."""
        import bottle
        request = bottle.LocalRequest(environ)
        secret = hashed(bearer(request))
        try:
            with db.connection_context():
                asks = who_asks(self.service, request)
        except (Unavailable, *STORE_ERRORS) as error:
            if secret != self.reader:
                raise trouble(error) or error from None
            return
        if asks.role != ADMIN or asks.scopes - {'read'} or asks.resource is not None:
            raise Forbidden("metrics need an admin's token; it may have the scope read")
        self.reader = secret

    def finish(self, environ: dict, answer: Reply, began: float, sent: int) -> None:
        """Counts a request that is answered, and writes its line."""
        operation, took = self.operation(environ), time.monotonic() - began
        token, received = environ.get('cmres.token'), int(environ.get('CONTENT_LENGTH') or 0)
        METRICS.count('requests_total', operation=operation, status=f'{answer.status}')
        METRICS.observe('request_seconds', took, operation=operation)
        rates, mib = self.service.shares.rates, (sent + received) / 2**20
        rates.add('mib_per_address', environ['cmres.address'], mib)
        if token and token.role != ADMIN:
            rates.add('mib_per_user', f'{token.project}/{token.user}', mib)
        if self.service.config.log_requests and not (
                environ['PATH_INFO'] in QUIET and answer.status < 400):
            told_fields(log_requests, 'request', id=environ['cmres.request_id'],
                        address=environ['cmres.address'], user=token and token.user,
                        project=token and token.project, token=token and token.id,
                        method=environ['REQUEST_METHOD'][:16], operation=operation,
                        status=answer.status, ms=round(1000 * took, 1), bytes=sent)

    def operation(self, environ: dict) -> str:
        """What a request asked for: the name of an operation, else the rule of a page, else -."""
        if environ['PATH_INFO'] in QUIET:
            return environ['PATH_INFO'][1:]
        rule = getattr(environ.get('bottle.route'), 'rule', '-')
        verb = environ['REQUEST_METHOD']
        return self.operations.get(('GET' if verb == 'HEAD' else verb, rule), rule)


class Reply:
    """How one request is answered, as far as the gate has a say in it."""

    def __init__(self, environ: dict, start_response: Callable):
        self.environ, self.start_response, self.status = environ, start_response, 0

    def begin(self, status: str, headers: list, exc_info=None):
        """Begins an answer, with what has to be said beside it."""
        self.status = int(status[:3])
        names = {name.lower() for name, _ in headers}
        also = [(name, value) for name, value in self.also() if name.lower() not in names]
        return self.start_response(status, headers + also, *([exc_info] if exc_info else []))

    def also(self) -> Iterator[tuple[str, str]]:
        """Headers that this answer needs."""
        for name in ('X-Request-Id', 'X-Openstack-Request-Id'):
            yield name, self.environ['cmres.request_id']
        if self.status in (429, 503):
            yield 'Retry-After', f"{self.environ.get('cmres.retry_after', RETRY)}"
        token = self.environ.get('cmres.token')
        if token and token.ends is not None and token.ends < time.time() + END_IS_NEAR:
            yield 'X-Cmres-Token-Ends', f"{token.id} {to_plain(instant(token.ends))}"

    def refuse(self, error: Error) -> list[bytes]:
        note_wait(self.environ, error)
        body = json_text(error_body(error)).encode()
        return self.say(error.status, body, UNKEPT | headers_of(error))

    def say(self, status: int, body: bytes, headers: dict) -> list[bytes]:
        """A whole answer."""
        from http.client import responses
        self.begin(f'{status} {responses[status]}', [
            *headers.items(), ('Content-Length', f'{len(body)}')])
        return [] if self.environ['REQUEST_METHOD'] == 'HEAD' else [body]


class Counting:
    """A body that tells how many bytes were sent of it, once it is closed."""

    def __init__(self, body: Iterable[bytes], end: Callable[[int], None]):
        self.body, self.end, self.sent = body, end, 0

    def __iter__(self) -> Iterator[bytes]:
        for each in self.body:
            self.sent += len(each)
            yield each

    def __len__(self) -> int:
        return len(self.body)

    def close(self) -> None:
        with suppress(AttributeError):
            self.body.close()
        self.end(self.sent)


def network_of(text: str) -> str:
    """What limits count an address under: itself, or of IPv6 the network; '' if it is none."""
    import ipaddress
    try:
        found = ipaddress.ip_address(text.partition('%')[0])
    except ValueError:
        return ''
    found = getattr(found, 'ipv4_mapped', None) or found
    return f'{found if found.version == 4 else ipaddress.ip_network((found, 64), strict=False)}'


class StoreMetrics:
    """What /metrics tells beside what is counted: how the store and the life cycle stand."""

    def __init__(self, service: Reservations, cycle: LifeCycle | None):
        self.service, self.cycle, self.lock = service, cycle, threading.Lock()
        self.seen: int | None = None  # the last event that was counted
        for code in TEXTS:  # Prometheus sees no increase from nothing to one
            METRICS.count('events_total', 0, code=code)
        for setting in LIMITED:
            METRICS.count('limited_total', 0, setting=setting)
        for name in ('wrong_tokens_total', 'sign_ins_total', 'hung_up_total'):
            METRICS.count(name, 0)

    def samples(self) -> list[tuple]:
        """Samples of all that is measured; without the store, where that can't be read."""
        with self.lock:
            try:
                with db.connection_context():
                    self.count_events()
                    for account in self.service.clouds.accounts():
                        METRICS.begin('start_delay_seconds', cloud=account)
                    found = [*self.of_store(), *self.of_resources()]
            except (Unavailable, *STORE_ERRORS) as error:
                log.warning('no metrics of the store: %s', trouble(error) or error)
                found = []
            return [*METRICS.samples(), *found, *self.of_process()]

    def count_events(self) -> None:
        """Counts the events that came since the last time, be they of another process."""
        newest = row('SELECT max(id) AS id FROM event').id or 0
        if self.seen is not None:
            for code, number in run('SELECT code, count(*) FROM event WHERE id > ? AND id <= ? '
                                    'GROUP BY code', self.seen, newest).fetchall():
                METRICS.count('events_total', number, code=code)
        self.seen = newest

    def of_store(self) -> Iterator[tuple]:
        """What is counted by few rows of the store."""
        now = self.service.clock()
        for name, which in (('waiting', 'reservation WHERE waiting IS NOT NULL'),
                            ('pending', 'reservation WHERE pending IS NOT NULL')):
            yield f'reservations_{name}', (), run(f'SELECT count(*) FROM {which}').fetchone()[0]
        number, oldest = run(
            'SELECT count(*), min(e.at) FROM outbox n JOIN event e ON e.id = n.event_id '
            'WHERE n.due IS NOT NULL').fetchone()
        yield 'notices_waiting', (), number
        yield 'notice_age_seconds', (), max(now - (now if oldest is None else oldest), 0)
        for account, state, number in run('SELECT account, state, count(*) FROM server '
                                          "WHERE state <> 'deleted' GROUP BY 1, 2").fetchall():
            yield 'servers', (('cloud', account), ('state', state)), number
        if lease := row('SELECT holder, until FROM lease'):
            renewed = lease.until - self.service.config.lease
            yield 'pass_age_seconds', (), max(now - renewed, 0)
            if lease.until > now:
                yield 'leader', (('host', lease.holder.partition(':')[0]),), 1
        yield 'store_damaged', (), int('"ok"' not in (fact('checked') or '"ok"'))

    def of_resources(self) -> Iterator[tuple]:
        """What each resource has, and how much of it is reserved now."""
        now = self.service.clock()
        for each in rows('SELECT * FROM resource WHERE removed IS NULL ORDER BY name'):
            most, classes = capacity(each), read_json(each.classes)
            used = level(each.id, now, classes)
            for name, value in (*zip(FIGURES, used), *used.classes):
                yield 'used', (('resource', each.name), ('class', name)), value
            for name, value in (*zip(FIGURES, most), *classes.items()):
                if value is not None and value >= 0:
                    yield 'capacity', (('resource', each.name), ('class', name)), value

    def of_process(self) -> Iterator[tuple]:
        """What is measured without the store."""
        yield 'version', (('version', __version__),), 1
        yield 'resident_bytes', (), resident()
        path = self.service.config.database
        sizes = [os.path.getsize(each) for each in (path, f'{path}-wal') if os.path.exists(each)]
        yield 'store_bytes', (), sum(sizes)
        yield 'disk_free_bytes', (), disk_free(path)
        for account, breaker in [*self.cycle.breakers.items()] if self.cycle else ():
            if account.startswith(' '):  # hosts of notices and calendars, which are no cloud
                continue
            left_alone = breaker.failures >= TRIPS or breaker.until > self.service.clock()
            yield 'cloud_left_alone', (('cloud', account),), int(left_alone)
            yield 'cloud_failures', (('cloud', account),), breaker.failures


def resident() -> int:
    """The memory of this process in bytes; 0 where that can't be told."""
    try:
        with open('/proc/self/statm', encoding='ascii') as file:
            return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except OSError:
        return 0


# Page ########################################################################
#
# What people see in a browser: pages drawn here, forms that call the service. A form names the
# operation that it is for, and its fields are read by `bind`, so that a person can do on the page
# exactly what their token can do by REST. Scripts only add to it: dragging, live state, checks
# while one types. Nothing comes from another host, and nothing is inline.

VIEWS = {'day': 1, 'week': 7, 'month': 31}  # and the days that each shows at most
MOST_PLACES = 12   # resources on one time line
MOST_BARS = 150    # reservations on one time line
MOST_LANES = 8     # of them, one below the other on one resource
MOST_LINES_SHOWN = 50  # reservations on one page of the list
THINNEST = 0.7     # percent of a time line that a bar takes at least
ROOM = 9           # percent of a time line that a label takes
SAFE = {'Content-Security-Policy': "default-src 'none'; style-src 'self'; script-src 'self'; "
                                   "connect-src 'self'; "
                                   "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        'X-Frame-Options': 'DENY', 'X-Content-Type-Options': 'nosniff',
        'Referrer-Policy': 'same-origin',
        'Cache-Control': 'no-store', 'Content-Type': 'text/html; charset=utf-8'}
#: A sign beside the word of each state, for those who don't tell colours apart.
SIGNS = {'waiting': '…', 'pending': '?', 'reserved': '○', 'starting': '◔', 'active': '●',
         'degraded': '◑',
         'ending': '◕', 'ended': '□', 'cancelled': '×', 'failed': '!'}

STYLE = '''
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b2430; --soft: #51606f;
  --line: #d5dbe1; --busy: #b9c3ce; --full: #8494a5; --mine: #0b62a4; --on-mine: #fff;
    --good: #0a6b4d;
  --warn: #8a5a00; --bad: #a63a00; --now: #c2410c; --tint: #e8f1f9; --focus: #0b62a4 }
@media (prefers-color-scheme: dark) {
  :root { --back: #11161c; --card: #1a212a; --text: #e8edf2; --soft: #a9b6c3; --line: #33404d;
    --busy: #4a5968;
    --full: #74869a; --mine: #7cbcf0; --on-mine: #0c1620; --good: #6fd3ae; --warn: #f0b95a;
      --bad: #ff9d73;
    --now: #ff9d73; --tint: #1f3040; --focus: #7cbcf0 }
}
* { box-sizing: border-box }
body { margin: 0; font: 15px/1.5 system-ui, 'Segoe UI', Roboto, 'Noto Sans', sans-serif;
  background: var(--back); color: var(--text) }
a { color: var(--mine) }
a:focus-visible, button:focus-visible, input:focus-visible, select:focus-visible,
  textarea:focus-visible,
  summary:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--focus);
    outline-offset: 2px }
.skip { position: absolute; left: -99rem }
.skip:focus { left: 1rem; top: .5rem; background: var(--card); z-index: 2 }
header { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; align-items: center;
  padding: .6rem 1.2rem;
  background: var(--card); border-bottom: 1px solid var(--line) }
header nav { display: flex; flex-wrap: wrap; gap: 1rem; flex: 1 }
header nav a { text-decoration: none; padding: .2rem 0 }
header nav a[aria-current] { font-weight: 600; border-bottom: 2px solid }
.brand { font-weight: 700; font-size: 1.15rem; letter-spacing: .02em; text-decoration: none;
  color: var(--text) }
main { max-width: 78rem; margin: 0 auto; padding: 1rem 1.2rem 3rem }
main:focus { outline: none }
footer { max-width: 78rem; margin: 0 auto; padding: 0 1.2rem 2rem; color: var(--soft);
  font-size: .9rem }
h1 { font-size: 1.5rem; margin: .4rem 0 .8rem }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem }
h3 { font-size: 1rem; margin: 0 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem;
  margin: .6rem 0 }
.soft { color: var(--soft) }
.small { font-size: .88rem }
.aside { position: absolute; left: -99rem }
time { white-space: nowrap }
main { overflow-wrap: break-word }
time + span { white-space: nowrap }
.place > div { min-width: 0 }
::placeholder { color: var(--soft); opacity: 1 }
.bar-top { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center;
  justify-content: space-between }
.tabs { display: flex; flex-wrap: wrap; gap: .35rem }
.tabs a { padding: .25rem .7rem; border: 1px solid var(--line); border-radius: 999px;
  text-decoration: none;
  background: var(--card) }
.tabs a[aria-current] { text-decoration: underline; background: var(--mine); color: var(--on-mine);
  border-color: var(--mine) }
button, .button { font: inherit; padding: .3rem .8rem; border-radius: 7px;
  border: 1px solid var(--mine);
  background: var(--card); color: var(--mine); cursor: pointer; text-decoration: none;
    display: inline-block }
button.main, .button.main { background: var(--mine); color: var(--on-mine) }
button.bad { border-color: var(--bad); color: var(--bad) }
input, select, textarea { font: inherit; padding: .3rem .5rem; border: 1px solid var(--full);
  border-radius: 6px; background: var(--back); color: var(--text); max-width: 100% }
label { display: block; font-size: .9rem }
label input:not([type=checkbox]), label select, label textarea { display: block; width: 100%;
  margin-top: .15rem }
.fields { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr));
  gap: .7rem 1rem }
.wide { grid-column: 1 / -1 }
.row { display: flex; flex-wrap: wrap; gap: .5rem; align-items: end }
h1 + .card, .card > :first-child { margin-top: 0 }
.card > p:last-child { margin-bottom: 0 }
#verdict { margin: .8rem 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top }
th { font-size: .85rem; color: var(--soft); font-weight: 600 }
.deed { display: inline-flex; gap: .25rem; margin: 0 .3rem .3rem 0 }
.deed input { width: 4rem }
td[data-name=Label] { min-width: 5.5rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0 }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
.state { white-space: nowrap; font-weight: 600 }
.state i { font-style: normal; display: inline-block; width: 1.2em }
.active, .ended { color: var(--good) }
.waiting, .pending, .starting, .degraded, .ending { color: var(--warn) }
.failed { color: var(--bad) }
.cancelled { color: var(--soft) }
.reserved { color: var(--mine) }
.note { border-left: 4px solid var(--good); background: var(--card); padding: .5rem .8rem }
.refused { border-left: 4px solid var(--bad); background: var(--card); padding: .5rem .8rem }
.refused p, .note p { margin: .2rem 0 }
.offers { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .4rem }
.place { display: grid; grid-template-columns: 11rem minmax(0, 1fr); gap: .2rem 1rem;
  padding: .6rem 0;
  border-top: 1px solid var(--line) }
.place:first-of-type { border-top: 0 }
.days { display: grid; grid-template-columns: 11rem 1fr; gap: 1rem }
.days svg { height: 1.4rem }
svg { display: block; width: 100% }
svg text { font-size: 12px; fill: var(--soft) }
svg .cell { fill: transparent }
svg a:hover .cell { fill: var(--mine); opacity: .15 }
svg .grid { stroke: var(--line) }
svg .most { stroke: var(--full); stroke-dasharray: 2 3 }
svg .room { fill: var(--tint) }
.room, .held, .free, .most, .now, .grid { pointer-events: none }
svg .held { fill: var(--busy) }
svg .bar .beside { fill: var(--text); font-weight: 600 }
svg .own rect { fill: var(--mine) }
svg .own text { fill: var(--on-mine); font-weight: 600 }
svg .other rect { fill: var(--full) }
svg .other text { fill: var(--back) }
svg .own.dashed rect { fill: var(--card); stroke: var(--mine); stroke-width: 2;
  stroke-dasharray: 4 3 }
svg .own.dashed text { fill: var(--mine) }
svg .closed { fill: url(#hatch) }
svg .hatch { stroke: var(--bad) }
svg .now { stroke: var(--now); stroke-width: 2 }
svg .drag { fill: var(--mine); opacity: .35; pointer-events: none }
svg.plot { touch-action: pan-y; cursor: crosshair; user-select: none }
@media (max-width: 40rem) {
  .place, .days { grid-template-columns: minmax(0, 1fr) }
  .days > :first-child { display: none }
  main, header, footer { padding-left: .8rem; padding-right: .8rem }
  .free.month, .free tspan, .thin { display: none }
  svg text { font-size: 10.5px }
  svg .beside { display: none }
  table, tbody, tr, td { display: block }
  thead { display: none }
  tr { border-bottom: 1px solid var(--line); padding: .4rem 0 }
  td { border: 0; padding: .1rem 0; display: grid; grid-template-columns: 6.5rem minmax(0, 1fr);
    gap: .5rem;
    overflow-wrap: anywhere }
  td:empty { display: none }
  td::before { content: attr(data-name); color: var(--soft); font-size: .88rem }
}
@media print {
  header nav, header form, footer, form, .tabs, .button, .skip { display: none }
  .card { border: 0 }
}
'''

SCRIPT = '''
'use strict';
const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
if (zone && !/(^|; )zone=/.test(document.cookie)) {
  document.cookie = `zone=${encodeURIComponent(zone)}; path=/; max-age=31536000; samesite=strict`;
  if (/(^|; )zone=/.test(document.cookie) && document.body.dataset.zone !== zone) location.reload();
}
for (const plot of document.querySelectorAll('svg.plot')) {
  const {resource, begin, end, snap} = plot.dataset, shade = plot.querySelector('.drag');
  const edges = plot.dataset.edges ? plot.dataset.edges.split(',').map(Number) : null;
  let from = null, dragged = false;
  const nearer = seconds => (a, b) => Math.abs(b - seconds) < Math.abs(a - seconds) ? b : a;
  const near = seconds => edges ? edges.reduce(nearer(seconds))
                                : +begin + Math.round((seconds - begin) / snap) * snap;
  const exact = event => {
    const box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    return +begin + Math.min(Math.max(share, 0), 1) * (end - begin);
  };
  const at = event => near(exact(event));
  const draw = (one, other) => {
    shade.setAttribute('x', `${100 * (one - begin) / (end - begin)}%`);
    shade.setAttribute('width', `${100 * (other - one) / (end - begin)}%`);
  };
  const book = (...ends) => {
    const [start, stop] = ends.map(each => new Date(1000 * each).toISOString());
    const chosen = stop ? {resource, start, end: stop} : {resource, start};
    location.assign('/book?' + new URLSearchParams(chosen));
  };
  plot.addEventListener('dragstart', event => event.preventDefault());
  plot.addEventListener('pointerdown', event => {
    dragged = false;
    from = event.button || event.target.closest('.bar') ? null : at(event);
  });
  plot.addEventListener('pointermove', event => {
    if (from === null || !dragged && at(event) === from) return;
    dragged = true;
    plot.setPointerCapture(event.pointerId);
    draw(Math.min(from, at(event)), Math.max(from, at(event)));
  });
  plot.addEventListener('pointerup', event => {
    if (from !== null && dragged && at(event) !== from)
      book(Math.min(from, at(event)), Math.max(from, at(event)));
    else draw(0, 0);
    from = null;
  });
  plot.addEventListener('pointercancel', () => { from = null; draw(0, 0); });
  plot.addEventListener('click', event => {
    const cell = event.target.closest('a');
    if (dragged) event.preventDefault();
    else if (cell && !cell.matches('.bar') && !edges && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      book(Math.floor((exact(event) - begin) / snap) * snap + +begin);
    }
  }, true);
}
const form = document.querySelector('form.booking'), verdict = document.getElementById('verdict');
if (form) {
  let timer, asked = 0;
  const fields = () => {
    const all = new FormData(form);
    all.delete('form');
    return new URLSearchParams(all);
  };
  const check = async () => {
    const turn = ++asked, answer = await fetch('/book/check?' + fields()).catch(() => null);
    if (turn !== asked) return;
    if (answer && answer.ok) verdict.innerHTML = await answer.text();
    else verdict.textContent = 'It could not be checked; load the page again.';
  };
  form.addEventListener('input', () => { clearTimeout(timer); timer = setTimeout(check, 300); });
  form.elements.resource.addEventListener('change', () => location.replace('/book?' + fields()));
}
const live = document.getElementById('live'), told = document.getElementById('told');
if (live) {
  let tag = `"${live.dataset.tag}"`;
  setInterval(async () => {
    if (document.hidden) return;
    const asked = fetch(live.dataset.href, {headers: {'If-None-Match': tag}});
    const answer = await asked.catch(() => null);
    if (answer && answer.status === 401) location.reload();
    if (!answer || !answer.ok) return;
    tag = answer.headers.get('ETag');
    const before = live.querySelector('.state').textContent;
    live.innerHTML = await answer.text();
    const now = live.querySelector('.state').textContent;
    if (now !== before) told.textContent = now;
  }, 1500);
}
'''

TEMPLATES = {'layout': '''<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}} · cmres</title>
<link rel="stylesheet" href="/page.css?{{version}}"><script src="/page.js?{{version}}"
defer></script>
</head>
<body data-zone="{{visit.zone.key}}">
<a class="skip" href="#main">Skip to content</a>
<header><a class="brand" href="/">cmres</a>
% if visit.actor:
<nav aria-label="Main">
% for href, name in visit.links:
<a href="{{href}}"{{!' aria-current="page"' if href == here else ''}}>{{name}}</a>
% end
</nav>
<span class="soft small"><bdi>{{visit.actor.user}}</bdi> in <bdi>{{visit.actor.project}}</bdi>,
{{visit.actor.role}}</span>
<form method="post" action="/sign-out">{{!visit.guard}}<button>Sign out</button></form>
% end
</header>
<main id="main" tabindex="-1">
% if note:
<p class="note" role="status">{{note}}</p>
% end
<h1>{{title}}</h1>
{{!body}}
</main>
<footer>
% if visit.actor:
<p><a href="/docs">REST</a></p>
% end
<form method="post" action="/zone" class="row">{{!visit.guard}}<label>Times are in the zone
<input name="zone" value="{{visit.zone.key}}" autocomplete="off"></label>
<input type="hidden" name="next" value="{{back}}">
<button>Change</button></form>
</footer>
</body>
</html>
''', 'sign in': '''
<div class="card">
% if refusal:
<div class="refused" role="alert"><p>{{refusal}}</p></div>
% end
<p>Sign in with the token that an admin gave you.</p>
<form method="post" action="/sign-in" class="fields">
<label class="wide">Token
<input name="token" type="password" autocomplete="current-password" required></label>
<input type="hidden" name="next" value="{{back}}">
<div><button class="main">Sign in</button></div>
</form>
</div>
''', 'docs': '''
<p class="soft">All that programs can ask for, with a token in the header
<code>Authorization: Bearer TOKEN</code> or <code>X-Auth-Token: TOKEN</code>. The same for programs:
<a href="/openapi.json">/openapi.json</a> (OpenAPI 3.1).</p>
<nav class="tabs" aria-label="Kinds">
% for tag in tags:
<a href="#{{tag}}">{{tag}}</a>
% end
<a href="#kinds">kinds</a></nav>
% for tag, (text, entries) in tags.items():
<h2 id="{{tag}}">{{tag.capitalize()}}</h2>
<p class="soft">{{text[0].upper() + text[1:]}}.</p>
% for verb, path, entry, arguments in sorted(entries, key=lambda each: 'deprecated' in each[2]):
<details class="card"><summary><strong>{{verb}}</strong> <code>{{path}}</code>
{{'(old form)' if entry.get('deprecated') else ''}}
<span class="soft">{{entry['summary']}}</span></summary>
% if entry['description'].rstrip('.') != entry['summary']:
<p>{{entry['description']}}</p>
% end
% if arguments:
<div class="scroll"><table>
<thead><tr><th>Argument</th><th>In</th><th>Kind</th><th>Meaning</th></tr></thead><tbody>
% for name, place, needed, kind, meaning in arguments:
<tr><td
data-name="Argument"><span><code>{{name}}</code>{{' (needed)' if needed else ''}}</span></td>
<td data-name="In">{{place}}</td><td data-name="Kind">{{kind}}</td>
<td data-name="Meaning">{{meaning}}</td></tr>
% end
</tbody></table></div>
% end
<dl>
% for status, answer in entry['responses'].items():
<dt>{{status}}</dt><dd>{{answer.get('description') or refusals[int(status)]}}
% for kind, content in answer.get('content', {}).items():
<span class="soft">{{told(content['schema'])}} ({{kind}})</span>
% end
</dd>
% end
</dl></details>
% end
% end
<h2 id="kinds">Kinds</h2>
% for name, kind in sorted(kinds.items()):
<details class="card" id="kind-{{name}}"><summary><strong>{{name}}</strong>
<span class="soft">{{kind.get('description', '')}}</span></summary>
% if kind.get('properties'):
<dl>
% for field, schema in kind['properties'].items():
<dt>{{field}}</dt><dd>{{told(schema)}}
<span class="soft">{{schema.get('description', '')}}</span></dd>
% end
</dl>
% else:
<p>{{told(kind)}}</p>
% end
</details>
% end
''', 'secret': '''
<div class="card" role="status"><p>{{words}}</p><p><code>{{secret}}</code></p>
<p>It is shown only now: copy it. Nobody can show it again.</p></div>
<p><a href="{{back}}">Back</a></p>
''', 'refused': '''
<div class="refused" role="alert"><p>{{sentence}}</p></div>
<p><a href="{{back}}">Back</a></p>
''', 'sure': '''
<div class="card"><p>{{words}} <strong><bdi>{{about}}</bdi></strong>
{{f', the one of {which[:16].replace("T", " ")}' if which else ''}}? This can not be undone.</p>
% for each in warnings:
<p><strong>{{each}}.</strong></p>
% end
<form method="post" action="/do/{{operation}}" class="row">{{!visit.guard}}
% for name, value in fields.items():
<input type="hidden" name="{{name}}" value="{{value}}">
% end
<input type="hidden" name="sure" value="yes"><button class="bad">Yes, {{words.lower()}}</button>
<a class="button" href="{{back}}">No</a></form></div>
''', 'plan': '''
<div class="bar-top">
<div class="tabs" role="group" aria-label="How much is shown">
% for each in views:
<a href="/?view={{each}}&amp;at={{at}}{{more}}"
{{!'aria-current="true"' if each == view else ''}}>{{each.capitalize()}}</a>
% end
</div>
<strong>{{span}}</strong>
<div class="tabs" role="group" aria-label="When">
<a href="/?view={{view}}&amp;at={{before}}{{more}}" aria-label="Earlier">‹ Earlier</a>
<a href="/?view={{view}}{{more}}">Today</a>
<a href="/?view={{view}}&amp;at={{after}}{{more}}" aria-label="Later">Later ›</a>
</div>
</div>
<svg class="hidden" width="0" height="0" aria-hidden="true"><defs><pattern id="hatch" width="7"
height="7"
patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><line class="hatch" x1="0" y1="0" x2="0"
y2="7"
stroke-width="2"/></pattern></defs></svg>
% if not groups:
<div class="card">
<p>There is nothing to reserve
yet{{': add a resource' if visit.actor.role == 'admin' else ''}}.</p></div>
% end
% for name, places in groups:
<section class="card" aria-label="{{name}}">
<h2>{{name}}</h2>
<div class="days" aria-hidden="true"><span></span><svg>
% for each in cells:
<text x="{{each.left}}%" dx="3" y="15"
{{!'class="thin"' if view == 'month' and int(each.name) % 5 != 1 else ''}}>{{each.name}}</text>
% end
</svg></div>
% for place in places:
<div class="place">
<div><h3><bdi>{{place.name}}</bdi></h3><span class="soft small">{{place.holds}}</span><br>
% if visit.writes:
<a class="small" href="/book?resource={{place.name}}">Book<span class="soft"> on
{{place.name}}</span></a>
% end
% if place.left_out:
<br><a class="small" href="/list">{{place.left_out}} more in the list</a>
% end
</div>
<svg class="plot" height="{{place.height}}" data-resource="{{place.name}}" data-begin="{{begin}}"
data-end="{{end}}"
data-snap="{{snap}}" data-edges="{{edges}}" role="group" 
aria-label="{{place.name}}: {{place.summary}}">
% if place.open:
<rect class="room" x="0" y="14" width="100%" height="50"/>
% end
<svg x="0" y="14" width="100%" height="50" viewBox="0 0 1000 50" preserveAspectRatio="none"><path
class="held"
d="{{place.path}}"/></svg>
% if place.limited:
<line class="most" x1="0" x2="100%" y1="14" y2="14"/>
% end
<svg width="100%" height="100%" viewBox="0 0 1000 9" preserveAspectRatio="none"><path class="grid"
d="{{''.join(f'M{10 * each.left:.0f} 0V9' for each in cells)}}"
vector-effect="non-scaling-stroke"/></svg>
<g class="free {{view}}">
% for each in place.cells:
% if each.free:
<text x="{{each.left}}%" dx="3" y="11">{{brief(each.free)}}
% if view != 'month':
<tspan>{{each.unit}} free</tspan>
% end
</text>
% end
% end
</g>
% for each in place.cells:
% if visit.writes:
<a href="/book?resource={{place.name}}&amp;start={{each.start}}" tabindex="-1">
% end
<rect class="cell" x="{{each.left}}%" width="{{each.width}}%"
height="64"><title>{{each.words}}</title></rect>
% if visit.writes:
</a>
% end
% end
% for each in place.closed:
<rect class="closed" x="{{each.left}}%" width="{{each.width}}%" y="14"
height="50"><title>{{each.words}}</title></rect>
% end
% for each in place.bars:
<a class="bar {{each.kind}}" href="{{each.href}}"><title>{{each.words}}</title>
<svg x="{{each.left}}%" width="{{each.width}}%" y="{{each.top}}" height="18"><rect width="100%"
height="100%" rx="4"/>
% if not each.narrow:
<text x="5" y="13">{{each.text}}</text>
% end
</svg>
% if each.narrow:
<text class="beside" x="{{each.beside}}%" dx="{{4 if each.beside > each.left else -4}}"
y="{{each.top + 13}}"
text-anchor="{{'start' if each.beside > each.left else 'end'}}">{{each.text}}</text>
% end
</a>
% end
% if now_at is not None:
<line class="now" x1="{{now_at}}%" x2="{{now_at}}%" y1="0" y2="{{place.height}}"/>
% end
<rect class="drag" x="0" y="0" width="0" height="{{place.height}}"/>
</svg>
</div>
% end
</section>
% end
<p>
% if page:
<a href="/?view={{view}}&amp;at={{at}}&amp;page={{page - 1}}">Resources before</a>
% end
% if next_places:
<a href="/?view={{view}}&amp;at={{at}}&amp;page={{next_places}}">More resources</a>
% end
</p>
% if left_out:
<p class="soft">Only the first {{bars}} reservations are drawn; <a href="/list">the list</a> has
them all.</p>
% end
<p class="soft small">Grey is what is held, up to the dashed line of the capacity; the figures are
what is free.
Yours are the bars below, by label; dashed ones wait or are pending. Hatched is maintenance; the
line across is now.
% if visit.writes:
Drag over free time, or follow a day or Book, to reserve.
% end
</p>
''', 'state': '''<span class="state {{state}}"><i
aria-hidden="true">{{sign}}</i>{{state}}</span>''', 'list': '''
% if over is not None:
<div class="bar-top"><div class="tabs" role="group" aria-label="Which">
<a href="/list"{{!'' if over else ' aria-current="true"'}}>Now and to come</a>
<a href="/list?over=1"{{!' aria-current="true"' if over else ''}}>Over</a></div>
% if visit.writes:
<a class="button main" href="/book">Book machines</a>
% end
</div>
% end
% if not lines:
<div class="card"><p>{{'Nothing is over yet' if over else 'Nothing is reserved'}}.</p></div>
% else:
<div class="card scroll" tabindex="0" role="region" aria-label="Reservations"><table>
<thead><tr><th scope="col">Label</th><th scope="col">State</th><th scope="col">Where</th><th
scope="col">Machines</th>
<th scope="col">From</th><th scope="col">To</th><th scope="col">Addresses</th>
{{!'<th scope="col">Change</th>' if visit.writes else ''}}</tr></thead>
<tbody>
% for each in lines:
<tr><td data-name="Label"><div><a href="{{each['href']}}">{{each['label']}}</a>
% if visit.actor.role == 'admin':
<br><span class="soft small"><bdi>{{each['user']}}</bdi> in <bdi>{{each['project']}}</bdi></span>
% end
</div></td>
<td data-name="State"><div>{{!visit.state(each['state'])}}
% if each['fault']:
<br><span class="small">{{each['fault'][:200]}}</span>
% end
% if each['late']:
<br><span class="soft small">{{each['late']}}</span>
% end
</div></td>
<td data-name="Where"><bdi>{{each['resource']}}</bdi></td>
<td data-name="Machines"><span>{{each['vms']}} <bdi>{{each['flavor']}}</bdi></span></td>
<td data-name="From"><span>{{!visit.at(each['start'])}}</span></td>
<td data-name="To"><span>{{!visit.at(each['end'])}}</span></td>
<td data-name="Addresses">{{', '.join(each['addresses'])}}</td>
% if visit.writes:
<td data-name="Change"><div>
% for deed in each['deeds']:
{{!visit.deed(deed, each)}}
% end
</div></td>
% end
</tr>
% end
</tbody></table></div>
% end
% if after:
<p><a
href="/list?{{'over=1&amp;' if over else ''}}after={{after}}">{{'Earlier' if over else 'Later'}} ones</a></p>
% end
''', 'verdict': '''
% if refusal is None and not fits:
<p class="soft">It says here whether it fits.</p>
% elif refusal is None:
<div class="note"><p>{{fits}}.</p>
% for each in warnings:
<p>{{each}}</p>
% end
</div>
% else:
<div class="refused"><p>{{refusal}}</p>
% if offers:
<p>What would fit:</p><div class="offers">
% for href, words in offers:
<a class="button" href="{{href}}">{{words}}</a>
% end
</div>
% end
</div>
% end
''', 'book': '''
<form method="post" action="/book" class="card booking">{{!visit.guard}}
<div class="fields">
<label>Label <input name="label" value="{{said['label']}}" required maxlength="64"
pattern="[A-Za-z0-9._\\-]+"
placeholder="lab" title="letters, digits, . _ -"></label>
<label>Resource <select name="resource">
% for each in places:
<option value="{{each}}"{{!' selected' if each == said['resource'] else ''}}>{{each}}</option>
% end
</select></label>
<label>From <input name="start" type="datetime-local" value="{{said['start']}}" required></label>
<label>To <input name="end" type="datetime-local" value="{{said['end']}}" required></label>
<label>Machines <input name="vms" type="number" min="1" max="1000000" value="{{said['vms']}}"
required></label>
<label>Flavor <input name="flavor" value="{{said['flavor']}}" list="flavors"
autocomplete="off"></label>
<label>Image <input name="image" value="{{said['image']}}" list="images" autocomplete="off"
placeholder="none: nothing boots"></label>
<label>At the end <select name="at_end">
% for each in ends:
<option{{!' selected' if each == said['at_end'] else ''}}>{{each}}</option>
% end
</select></label>
<label>Repeat
<input name="repeat" value="{{said['repeat']}}" list="repeats" autocomplete="off"
placeholder="once"></label>
<label>Until <input name="until" type="date" value="{{said['until']}}"></label>
<label class="wide">Description <textarea name="description"
rows="2">{{said['description']}}</textarea></label>
<label><input type="checkbox" name="wait" value="true"{{!' checked' if said['wait'] else ''}}>
If it does not fit, wait</label>
</div>
<details><summary>More</summary><div class="fields">
% for name, words in more.items():
<label>{{words}} <input name="{{name}}" value="{{said[name]}}"></label>
% end
<label>Where one of a series does not fit <select name="on_conflict">
% for each in ('', 'skip'):
<option value="{{each}}"{{!' selected' if each == said['on_conflict'] else ''}}>
{{'leave it out' if each else 'refuse all'}}</option>
% end
</select></label></div></details>
% if why:
<p class="soft small">No flavors and images are offered: {{why}}</p>
% end
% for kind, names in names.items():
<datalist id="{{kind}}s">
% for each in names:
<option value="{{each}}"></option>
% end
</datalist>
% end
<datalist id="repeats">
% for each in usual_rules:
<option value="{{each}}"></option>
% end
</datalist>
<div id="verdict" role="status" aria-live="polite">{{!verdict}}</div>
<div class="row"><button class="main">Book</button><button name="check" value="yes"
formnovalidate>Check</button></div>
</form>
''', 'reservation': '''
<p id="told" class="aside" role="status"></p>
<div id="live" data-href="{{href}}/live{{query}}" data-tag="{{tag}}">{{!live}}</div>
% if visit.writes and found['state'] not in over:
<h2>Change</h2>
<form method="post" action="/do/update" class="card">{{!visit.guard}}<div class="fields">
<input type="hidden" name="label" value="{{found['label']}}">
<input type="hidden" name="project" value="{{found['project']}}">
<input type="hidden" name="next" value="{{back}}"><input type="hidden" name="was_start"
value="{{start}}">
<input type="hidden" name="was_end" value="{{end}}"><input type="hidden" name="was_vms"
value="{{found['vms']}}">
% if occurrence:
<input type="hidden" name="occurrence" value="{{occurrence}}">
% end
% if found['state'] in ('reserved', 'waiting', 'pending'):
<label>From <input name="start" type="datetime-local" value="{{start}}"></label>
% end
<label>To <input name="end" type="datetime-local" value="{{end}}"></label>
<label>Machines <input name="vms" type="number" min="1" value="{{found['vms']}}"></label>
</div><p><button>Change</button>
{{'only this one' if occurrence else 'all that has not begun' if found['tz'] else ''}}</p></form>
% end
''', 'live': '''
<div class="card"><dl>
<dt>State</dt><dd>{{!visit.state(found['state'])}}
% if found['fault']:
<span class="small">{{found['fault']}}</span>
% end
</dd>
% for name, value in facts:
<dt>{{name}}</dt><dd>{{!value}}</dd>
% end
</dl></div>
% if deeds:
<div class="row">
% for each in deeds:
{{!each}}
% end
</div>
% end
% if found.get('occurrences'):
<h2>Occurrences</h2><div class="card scroll" tabindex="0" role="region"
aria-label="Occurrences"><table>
<thead><tr><th scope="col">From</th><th scope="col">To</th><th scope="col">Machines</th>
<th scope="col">State</th></tr></thead>
<tbody>
% for each in found['occurrences'][:60]:
<tr><td data-name="From"><a href="{{visit.href(found['label'], found['project'], each['start'])}}">
{{!visit.at(each['start'])}}</a></td>
<td data-name="To"><span>{{!visit.at(each['end'])}}</span></td>
<td data-name="Machines"><span>{{each['vms']}} on <bdi>{{each['resource']}}</bdi></span></td>
<td data-name="State">{{!visit.state(each['state'])}}</td></tr>
% end
</tbody></table></div>
% if len(found['occurrences']) > 60:
<p class="soft">and {{len(found['occurrences']) - 60}} more</p>
% end
% end
% if found['servers']:
<h2>Servers</h2><div class="card scroll" tabindex="0" role="region" aria-label="Servers"><table>
<thead><tr><th scope="col">Name</th><th scope="col">State</th><th scope="col">Addresses</th><th
scope="col">Ready</th>
<th scope="col">Fault</th></tr></thead><tbody>
% for each in found['servers']:
<tr><td data-name="Name">{{each['name']}}</td><td data-name="State">{{each['state']}}</td>
<td data-name="Addresses">{{', '.join(each['addresses'])}}</td><td
data-name="Ready">{{late(each)}}</td>
<td data-name="Fault">{{each['fault']}}</td></tr>
% end
</tbody></table></div>
% end
<h2>Journal</h2><div class="card scroll" tabindex="0" role="region" aria-label="Journal"><table>
<thead><tr><th scope="col">When</th><th scope="col">Who</th><th scope="col">What</th>
<th scope="col">Why</th></tr></thead><tbody>
% for each in events:
<tr><td data-name="When"><span>{{!visit.at(each['at'])}}</span></td>
<td data-name="Who"><bdi>{{each['actor']}}</bdi></td><td data-name="What">{{each['code']}}</td>
<td data-name="Why"><bdi>{{each['sentence']}}</bdi></td></tr>
% end
</tbody></table></div>
''', 'table': '''
<div class="card scroll" tabindex="0" role="region" aria-label="{{name}}">
% if lines:
<table><thead><tr>
% for each in columns:
<th scope="col">{{each.replace('_', ' ')}}</th>
% end
% if deeds:
<th scope="col">change</th>
% end
</tr></thead><tbody>
% for line in lines:
<tr>
% for each in columns:
<td data-name="{{each.replace('_', ' ')}}">{{!visit.cell(line.get(each))}}</td>
% end
% if deeds:
<td data-name="change"><div>
% for deed in deeds:
{{!visit.deed(deed, line)}}
% end
</div></td>
% end
</tr>
% end
</tbody></table>
% else:
<p class="soft">None.</p>
% end
</div>
''', 'form': '''
<details class="card"><summary>{{title}}</summary>
<form method="post" action="/do/{{operation}}">{{!visit.guard}}<input type="hidden" name="next"
value="{{visit.home}}">
<input type="hidden" name="once" value="{{once}}">
<p class="soft small">{{summary}}</p><div class="fields">
% for name, words, required, choices in fields:
<label>{{name.replace('_', ' ').capitalize()}}
% if choices:
<select name="{{name}}">
% for each in choices:
<option>{{each}}</option>
% end
</select>
% else:
<input name="{{name}}"{{!' required' if required else ''}}>
% end
<span class="soft small">{{words}}</span></label>
% end
</div><p><button class="main">{{title}}</button></p></form></details>
''', 'deed': '''<form class="deed" method="post" action="/do/{{operation}}">{{!visit.guard}}
% for name, value in fields.items():
<input type="hidden" name="{{name}}" value="{{value}}">
% end
<button{{!' class="bad"' if bad else ''}} aria-label="{{words}} {{about}}">{{words}}</button>
% if field:
<input name="{{field[0]}}" value="{{field[2]}}" placeholder="{{field[1]}}"
aria-label="{{words}} {{about}} {{field[1]}}">
% end
</form>'''}

#: What a button does: its word, the field beside it (argument, word, default), and whether it takes
#: something away.
DEEDS = {'extend': ('Extend', ('by', 'by', '+1h'), False),
         'keep': ('Keep on', ('until', 'for', '+1h'), False),
         'skip': ('Skip', None, True), 'delete': ('Cancel', None, True),
         'accept': ('Accept', None, False),
         'approve': ('Approve', None, False), 'reject': ('Reject', ('reason', 'because', ''), True),
         'maintenance_delete': ('Call off', None, True), 'token_revoke': ('Revoke', None, True),
         'token_renew': ('Renew', None, False),
         'limit_delete': ('Take away', None, True), 'resource_delete': ('Remove', None, True)}
ASKS = ('delete', 'resource_delete', 'token_revoke')  # what is asked for twice
SECRET = {'token', 'feed'}  # fields of answers: shown in the answer itself, and kept nowhere
#: What can be done to a reservation in each state; to a pending one, what its holder or an admin
#: says.
DEEDS_IN = {'cancelled': ('skip',), 'waiting': ('delete',), 'pending': ('delete',),
            'reserved': ('extend', 'skip', 'delete'),
            **dict.fromkeys(('starting', 'active', 'degraded'), ('extend', 'keep', 'delete'))}
#: The fields of the admin's forms, in the order in which people think of them.
FORMS = {'resource_add': ('name', 'cloud', 'region', 'aggregate', 'vms', 'vcpus', 'ram', 'classes',
                          'mode', 'approval'),
         'resource_update': ('name', 'vms', 'vcpus', 'ram', 'classes', 'mode', 'hold', 'approval',
                             'no_show'),
         'maintenance_add': ('resource', 'start', 'end', 'reason', 'then'),
         'limit_add': ('project', 'user', 'resource', 'most_vms', 'longest', 'ahead',
                       'least_notice', 'vcpu_hours',
                       'waiting', 'exempt'),
         'token_add': ('user', 'project', 'role', 'purpose', 'lasts', 'scopes', 'resource')}
#: Of those fields; the first of them is what is meant unless one is chosen.
PICKS = {'mode': ('', 'open', *MODES), 'then': THEN, 'role': ('', USER, READER, ADMIN),
         'scopes': ('', *SCOPES)}
TOKEN_COLUMNS = 'id user project role purpose scopes resource added ends last_used'
TITLES = {'resource_add': 'Add a resource', 'resource_update': 'Change a resource',
          'token_add': 'Make a token',
          'maintenance_add': 'Plan a maintenance', 'limit_add': 'Set a limit'}
DONE = {'extend': 'is longer now', 'keep': 'goes on', 'skip': 'is left out',
        'undo': 'has the occurrence again', 'delete': 'is cancelled',
        'update': 'is changed', 'accept': 'is yours', 'approve': 'is approved',
        'reject': 'is rejected'}
MORE = {'network': 'Network', 'key': 'Key pair', 'lead': 'Boot before the start by',
        'notify': 'Notify',
        'skip_dates': 'Not on these dates'}  # further fields of the form to book
USUAL_RULES = ('daily', 'weekdays', 'every tuesday', 'weekly on tue,thu', 'every 2 weeks on mon',
               'monthly on first mon')
BOOKING = ('label', 'resource', 'start', 'end', 'vms', 'flavor', 'image', 'at_end', 'repeat',
           'until', 'skip_dates',
           'on_conflict', 'network', 'key', 'lead', 'notify', 'description', 'wait')


class Cell(NamedTuple):
    """A day, or some hours, of a time line; where it is in percent of its width; instants in
    seconds.
    """
    left: float
    width: float
    begin: int
    until: int
    name: str
    start: str
    words: str = ''
    free: str = ''
    unit: str = ''


class Bar(NamedTuple):
    """A reservation, or a maintenance, on a time line."""
    left: float
    width: float
    words: str
    top: int = 0
    text: str = ''
    href: str = ''
    kind: str = ''

    @property
    def narrow(self) -> bool:
        """Whether its text has no room in it, and stands beside it."""
        return self.width < ROOM

    @property
    def beside(self) -> float:
        """Where that text begins, or ends where there is no room behind it."""
        behind = round(self.left + self.width, 3)
        return behind if behind <= 100 - ROOM else self.left


class Drawn(NamedTuple):
    """A resource on a time line: what it holds in words, its curve, and what stands on it."""
    name: str
    holds: str
    summary: str
    limited: bool
    open: bool
    path: str
    cells: list[Cell]
    closed: list[Bar]
    bars: list[Bar]
    height: int
    left_out: int


def render_page(template: str, /, **values) -> str:
    """A template with its values, all of them escaped."""
    return template_of(template).render(**values).strip('\n')


@functools.lru_cache
def template_of(name: str):
    import bottle
    return bottle.SimpleTemplate(TEMPLATES[name], escape_func=in_html)


def in_html(value) -> str:
    """A value as the text of a page."""
    import bottle
    return bottle.html_escape(legible(str(value)))


@dataclasses.dataclass
class Visit:
    """A request from a browser: who has signed in, if anybody, and how pages are written for
    them.
    """
    service: Reservations
    actor: Actor | None
    zone: ZoneInfo
    site: ZoneInfo  # in which the service itself lives
    form: str       # what a form of theirs must carry

    @property
    def home(self) -> str:
        """Where what they look after is listed."""
        return '/admin' if self.actor.role == ADMIN else '/tokens'

    @property
    def writes(self) -> bool:
        """Whether they may change anything at all."""
        return self.actor is not None and self.actor.role != READER and not self.actor.scopes

    @property
    def links(self) -> list[tuple[str, str]]:
        """The pages that this person has a use for."""
        return [('/', 'Plan'), ('/list', 'Reservations'),
                *([('/book', 'Book')] if self.writes else []), ('/tokens', 'Tokens'),
                *([('/admin', 'Admin')] if self.actor.role == ADMIN else [])]

    @property
    def here(self) -> Here:
        """Where and when what they type is read."""
        return self.service.here

    @property
    def guard(self) -> str:
        """What proves that a form is one of ours."""
        return f'<input type="hidden" name="form" value="{self.form}">'

    def at(self, moment: datetime) -> str:
        """A time for people, and where clocks differ from the service's own, that one too."""
        here, there = moment.astimezone(self.zone), moment.astimezone(self.site)
        day = '' if here.date() == there.date() else f'{there:%a} '
        other = '' if here.utcoffset() == there.utcoffset() else (
            f' <span class="soft small">({day}{there:%H:%M} {there:%Z})</span>')
        shown = f'{here:%a} {here.day} {here:%b %Y %H:%M}'
        return f'<time datetime="{moment:%Y-%m-%dT%H:%MZ}">{shown}</time>{other}'

    def plain(self, moment: datetime) -> str:
        """A time within a sentence."""
        here = moment.astimezone(self.zone)
        return f'{here:%a} {here.day} {here:%b %H:%M}'

    def state(self, word: str) -> str:
        """A state as a word with its sign."""
        return render_page('state', state=word, sign=SIGNS[word])

    def cell(self, value) -> str:
        """Any value of an answer, as a table shows it."""
        import bottle
        if value in (None, '', {}, []):
            return ''
        text = (self.at(value) if isinstance(value, datetime)
                else bottle.html_escape(in_cell(value, self.zone)))
        return f'<span>{text}</span>'

    def href(self, label: str, project: str, start: datetime | None = None) -> str:
        """The address of the page of a reservation, or of one of its occurrences."""
        which = {'project': project} | ({'occurrence': to_plain(start)} if start else {})
        return f'/r/{quote(label)}?{urlencode(which)}'

    def deed(self, name: str, line: dict, wide: bool = False, occurrence: str = '') -> str:
        """The button that does something to what a line is about.

        Args:
          wide: there is room for a field beside it, and it leads back to the page of the
            reservation
          occurrence: of a series, the one that is meant
        """
        words, field, bad = DEEDS[name]
        undo = name == 'skip' and line.get('state') == 'cancelled'
        words, bad = ('Put back', False) if undo else (words, bad)
        if 'label' in line:
            fields = {'label': line['label'], 'project': line['project']}
            onward = '/list' if not wide or bad and not occurrence else self.href(*fields.values())
            fields |= {'occurrence': occurrence} if occurrence else {}
            fields |= {'undo': 'true'} if undo else {}
            if name == 'delete':
                words += ' this one' if occurrence else ' all' if line.get('tz') else ''
        else:
            fields = {key: line[key] for key in ('name', 'id') if key in line}
            onward = self.home
            fields = dict([next(iter(fields.items()))])
        field = field if wide or name in ('extend', 'keep') else None
        return render_page('deed', visit=self, operation=name, fields=fields | {'next': onward},
                           words=words, bad=bad,
                           field=field, about=next(iter(fields.values())))

    def deeds(self, found: dict) -> list[str]:
        """What this person can do to a reservation."""
        asks = []
        if found['state'] == 'pending' or 'change' in found:
            held = self.service.look.occurrence(found['id'])
            asks = (['accept'] if held.confirm else ['approve', 'reject']
                    if self.actor.role == ADMIN else [])
        skips = found['tz'] and found['start'] > self.here.now
        can = [deed for deed in DEEDS_IN.get(found['state'], ()) if deed != 'skip' or skips]
        return [*asks, *can] if self.writes else []


class CloudNames:
    """The names of flavors and images on clouds, looked up aside: nobody waits long for a cloud
    that is slow.
    """

    def __init__(self, clouds: Clouds):
        self.clouds, self.lock = clouds, threading.Lock()
        # By account and what of it is in sight: until when, names by kind, why there are none.
        self.found: dict[tuple[str, Sight], tuple[float, dict, str]] = {}
        self.asking: dict[tuple[str, Sight], threading.Thread] = {}

    def of(self, account: str, sight: Sight,
           patience: float = 1) -> tuple[dict[str, list[str]], str]:
        """The names in sight, by kind; and why, if the cloud does not answer within some
        seconds.
        """
        nothing = (0.0, {'flavor': [], 'image': []}, f'the cloud {account} does not answer yet')
        key = account, sight._replace(project='')  # that is for servers only
        with self.lock:
            thread = self.asking.get(key)
            under_way = thread and thread.is_alive()
            asks = time.monotonic() >= self.found.get(key, nothing)[0] and not under_way
            if asks:
                thread = self.asking[key] = threading.Thread(target=self.ask, args=key, daemon=True)
                thread.start()
        if asks and key not in self.found:  # who comes later does not wait as well
            thread.join(patience)
        return self.found.get(key, nothing)[1:]

    def ask(self, account: str, sight: Sight) -> None:
        """Looks the names up, however long that takes."""
        try:
            cloud = self.clouds.open(account)
            names, why = {kind: sorted(cloud.names(kind, sight))[:500]
                          for kind in ('flavor', 'image')}, ''
        except CloudError as error:
            names, why = {'flavor': [], 'image': []}, str(error)
        self.found[account, sight] = time.monotonic() + (10 if why else 60), names, why


class Pages:
    """The handlers of all pages of a service."""

    def __init__(self, service: Reservations):
        self.service = service
        self.names = CloudNames(service.clouds)
        self.sent: deque[str] = deque(maxlen=1000)  # forms that were sent, by their numbers
        self.key_file = key_file(service.config.database, service.config.key)
        self.read: tuple = (None, [])  # the stamp of that file, and what was in it

    def mount(self, app) -> None:
        """Gives an application the addresses of all pages."""
        for verb, path, handle in (
                ('GET', '/', self.plan), ('GET', '/list', self.list), ('GET', '/book', self.book),
                ('POST', '/book', self.add), ('GET', '/book/check', self.check),
                ('GET', '/r/<label>', self.reservation), ('GET', '/r/<label>/live', self.live),
                ('GET', '/admin', self.admin), ('GET', '/tokens', self.tokens),
                ('GET', '/docs', self.docs), ('POST', '/do/<name>', self.do)):
            app.route(path, verb, self.visited(handle))
        for verb, path, handle in (('GET', '/sign-in', self.ask),
                                   ('POST', '/sign-in', self.sign_in),
                                   ('POST', '/sign-out', self.sign_out),
                                   ('POST', '/zone', self.choose_zone)):
            app.route(path, verb, self.visited(handle, signed_in=False))
        for path, text, kind in (('/page.css', STYLE, 'text/css'),
                                 ('/page.js', SCRIPT, 'text/javascript')):
            app.route(path, 'GET', lambda text=text, kind=kind: answered(text, headers={
                'Content-Type': f'{kind}; charset=utf-8',
                'Cache-Control': 'public, max-age=31536000, immutable'}))

    def docs(self, visit: Visit, given: dict):
        """What programs can ask for: /openapi.json for people."""
        told = openapi()
        by_tag = {tag['name']: (tag['description'], []) for tag in told['tags']}
        for path, verbs in told['paths'].items():
            for verb, entry in verbs.items():
                line = verb.upper(), path, entry, arguments_told(entry)
                by_tag[entry['tags'][0]][1].append(line)
        return self.page(visit, 'REST', render_page(
            'docs', tags=by_tag, kinds=told['components']['schemas'], told=kind_told,
            refusals=REFUSALS))

    # Who visits

    @property
    def keys(self) -> list[bytes]:
        """What we sign with, the newest first; another process may have made a new one."""
        stamp = file_stamp(self.key_file)
        if stamp and stamp != self.read[0]:
            self.read = stamp, read_keys(self.key_file)
        return self.read[1]

    def sign(self, purpose: str, text: str, key: bytes = b'') -> str:
        """What only we can know of a text, for one purpose."""
        import hmac
        return hmac.new(key or self.keys[0], f'{purpose}\0{text}'.encode(), 'sha256').hexdigest()

    def signed(self, purpose: str, text: str) -> str:
        """A text with its signature."""
        return f'{text}.{self.sign(purpose, text)}'

    def unsigned(self, purpose: str, text: str) -> str | None:
        """What was signed, if it was by us, for this."""
        said, _, sign = text.rpartition('.')
        ours = [secrets.compare_digest(sign.encode(), self.sign(purpose, said, key).encode())
                for key in self.keys]
        return said if any(ours) else None

    def visit(self, request) -> Visit:
        """Who sends a request: by the cookie of a session that lasts, of a token in force."""
        session = hashed(self.unsigned('session', request.get_cookie('cmres') or '') or '')
        now = self.service.clock()
        found = row(f'{TOKEN} JOIN session s ON s.token_id = t.id '
                    f'WHERE s.hash = ? AND s.until > ? AND {IN_FORCE}', session, int(now), now)
        actor = bearer_of(found) if found else None
        if found:
            note_caller(self.service, request.environ, found)
        try:
            zone = read_zone(unquote(request.get_cookie('zone') or '')
                             or self.service.config.timezone)
        except Invalid:
            zone = self.service.config.zone
        service = self.service.acting(actor or Actor('', '', READER))
        service.wanted = while_there(request.environ)
        # sentences speak in the person's zone
        service.config = dataclasses.replace(service.config, timezone=zone.key)
        form = self.sign('form', f'{found.id}' if found else '')
        return Visit(service, actor, zone, self.service.config.zone, form)

    def anybody(self, request) -> Visit:
        """Who sends a request, or nobody in particular while the store can't be read."""
        try:
            return self.visit(request)
        except (Unavailable, *STORE_ERRORS):
            zone = self.service.config.zone
            return Visit(self.service.acting(Actor('', '', READER)), None, zone, zone, '')

    def visited(self, handle: Callable, signed_in: bool = True) -> Callable:
        """A handler of a page: who visits, what a form says, and what becomes of an error."""
        import bottle

        def handler(**path):
            request, given = bottle.request, {}
            visit = self.visit(request)
            try:
                given = read_query(request) if request.method == 'GET' else read_form(request)
                if signed_in and not visit.actor:
                    return self.asking(visit, request, given)
                if request.method == 'POST':
                    self.refuse_foreign(request, given, visit, signed_in)
                with visit.service.shares.answering(visit.service.actor.user):
                    return handle(visit, **path, given=given)
            except Error as error:
                return self.refusal(visit, error, local(given.get('next')))
        return handler

    def refusal(self, visit: Visit, error: Error, back: str):
        """The page that says what could not be done."""
        import bottle
        note_wait(bottle.request.environ, error)
        return self.page(visit, 'Refused', render_page('refused', sentence=str(error), back=back),
                         error.status)

    def refuse_foreign(self, request, given: dict, visit: Visit, signed_in: bool) -> None:
        """Refuses what another site's page sends: by where it comes from, and by what only our
        forms know.
        """
        origin = header(request, 'Origin')
        ours = (header(request, 'Host'), urlsplit(self.service.config.address).netloc or None)
        elsewhere = origin and (urlsplit(origin).netloc or '-') not in ours
        if (elsewhere
            or header(request, 'Sec-Fetch-Site', 'same-origin') not in ('same-origin', 'none')):
            raise Forbidden('this form comes from another site')
        if (not secrets.compare_digest(given.pop('form', '').encode(), visit.form.encode())
            and signed_in):
            raise Forbidden('this form is of another person, or comes from elsewhere; go back and '
                            'load the page again')

    def page(self, visit: Visit, title: str, body: str, status: int = 200):
        """A whole page; what the last form did is said once."""
        import bottle
        note = self.unsigned('note', unquote(bottle.request.get_cookie('note') or ''))
        here = bottle.request.path
        back = here + (f'?{bottle.request.query_string}' if bottle.request.query_string else '')
        text = render_page('layout', title=title, body=body, visit=visit, note=note, here=here,
                           version=LOOK,
                           back=back if bottle.request.method == 'GET' and visit.actor else '/')
        made = answered(text, status)
        if note:
            made.delete_cookie('note', path='/')
        return made

    def asking(self, visit: Visit, request, given: dict):
        """The form to sign in, which leads back to what was asked for, and to what was typed."""
        typed = {name: value for name, value in given.items() if name in BOOKING and value}
        query = (f'?{urlencode(typed)}' if request.method == 'POST'
                 else f'?{request.query_string}'.rstrip('?'))
        aside = request.path.endswith(('/live', '/check'))
        goes = request.method == 'GET' and not aside or request.path == '/book'
        status = 200 if request.method == 'GET' and not aside else 401
        return self.page(visit, 'Sign in', render_page(
            'sign in', refusal='', back=request.path + query if goes else '/'), status)

    def ask(self, visit: Visit, given: dict):
        """The form to sign in, empty: addresses stand in logs and histories, so no token may."""
        return self.page(visit, 'Sign in', render_page('sign in', refusal='', back='/'))

    def sign_in(self, visit: Visit, given: dict):
        """Signs in by a token, for as long as `signed_in` says."""
        import bottle
        token = given.get('token', '').strip()
        try:
            self.refuse_programs(actor := actor_of(token, self.service.clock()))
        except (Unauthorized, Forbidden) as error:
            if isinstance(error, Unauthorized):
                note_wrong(self.service, bottle.request.environ)
            return self.page(visit, 'Sign in', render_page(
                'sign in', refusal=str(error), back=local(given.get('next'))), 401)
        session, lasts = secrets.token_urlsafe(24), self.service.config.signed_in
        made = self.onward(local(given.get('next')))
        with transaction():
            run('DELETE FROM session WHERE until <= ?', int(self.service.clock()))
            run('INSERT INTO session (hash, token_id, until) '
                'SELECT ?, id, ? FROM token WHERE hash = ?',
                hashed(session), int(self.service.clock() + lasts), hashed(token))
            where = bottle.request.environ.get('cmres.address') or 'an unknown address'
            journal(self.service.config, self.service.clock(), actor.user, 'signed_in',
                    f'{actor.user} in {actor.project} signed in from {where}')
        METRICS.count('sign_ins_total')
        self.set_cookie(made, 'cmres', self.signed('session', session), int(lasts))
        return made

    def refuse_programs(self, actor: Actor) -> None:
        """Forbidden for a token that is good for less than pages show."""
        if actor.scopes - {'read'} or actor.resource is not None:
            raise Forbidden('this token is for a program: it is good for a few operations only. '
                            'Sign in with another')

    def sign_out(self, visit: Visit, given: dict):
        """Ends the session, also for whoever has a copy of its cookie."""
        import bottle
        session = self.unsigned('session', bottle.request.get_cookie('cmres') or '')
        if session:
            with transaction():
                run('DELETE FROM session WHERE hash = ?', hashed(session))
        made = self.onward('/')
        made.delete_cookie('cmres', path='/')
        return made

    def choose_zone(self, visit: Visit, given: dict):
        """Shows times in another zone from now on."""
        zone, made = read_zone(given.get('zone', '')), self.onward(local(given.get('next')))
        made.set_cookie('zone', quote(zone.key, safe=''), path='/', samesite='strict',
                        max_age=31536000)
        return made

    def onward(self, href: str, note: str = ''):
        """Leads on after a form, so that loading again does not send it again."""
        made = answered('', 303, {'Location': href})
        if note:
            self.set_cookie(made, 'note', quote(self.signed('note', note[:800]), safe=''), 60)
        return made

    def set_cookie(self, made, name: str, value: str, lasts: int) -> None:
        """Sets a cookie that scripts and other sites can't use."""
        made.set_cookie(name, value, path='/', httponly=True, samesite='strict', max_age=lasts,
                        secure=self.service.config.address.startswith('https:'))

    # The time line

    def plan(self, visit: Visit, given: dict):
        """Resources against time: what is held, what is one's own, what is free."""
        view = given.get('view', 'week') if given.get('view') in VIEWS else 'week'
        today = visit.here.now.astimezone(visit.zone).date()
        first, after = span_of_view(view, read_date(given.get('at')) or today)
        cells = cells_of(view, first, after, visit.zone)
        begin, end = (int(from_wall(at_midnight(each), visit.zone).timestamp())
                      for each in (first, after))
        page = int(given['page']) if re.fullmatch('[0-9]{1,4}', given.get('page', '')) else 0
        places = sorted(visit.service.look.places(),
                        key=lambda each: (each.cloud, each.region, each.name))
        shown = places[page * MOST_PLACES:(page + 1) * MOST_PLACES]
        found = self.on_plan(visit, shown, begin, end)
        drawn = [(place, self.draw(visit, place, cells, begin, end, view, [
            each for each in found[:MOST_BARS] if each.resource_id == place.id]))
                 for place in shown]
        groups: dict = defaultdict(list)
        for place, each in drawn:
            groups[', '.join(filter(None, (place.cloud or 'no cloud', place.region)))].append(each)
        now = visit.service.clock()
        return self.page(visit, 'Plan', render_page(
            'plan', visit=visit, brief=in_brief_figures, views=VIEWS, view=view, at=first,
            before=first - timedelta(days=1), after=after,
            span=named_span(view, first, after), cells=cells, groups=groups.items(), begin=begin,
            end=end,
            snap=900 if view == 'day' else 3600, bars=MOST_BARS, page=page,
            edges=','.join(str(each.begin) for each in cells) + f',{end}' if view == 'month'
            else '',
            now_at=percent(now, begin, end) if begin <= now < end else None,
            left_out=len(found) > MOST_BARS,
            more=f'&page={page}' if page else '',
            next_places=page + 1 if len(places) > (page + 1) * MOST_PLACES else 0))

    def on_plan(self, visit: Visit, places: list, begin: int, end: int) -> list:
        """The reservations that are drawn, one more than there may be if there are more."""
        filters, where = visit.service.look.filtered(
            dict.fromkeys(('user', 'project', 'resource', *PLACE), ''))
        filters |= {'places': [each.id for each in places]}
        where += [('o.start < ?', end), ('o."end" > ?', begin), ('o.cancelled IS NULL',)]
        ways = visit.service.look.ways(filters, (), begin)
        return visit.service.look.page(ways, where, (), MOST_BARS + 1, fields=BRIEF)

    def draw(self, visit: Visit, place, cells: list[Cell], begin: int, end: int, view: str,
             found: list) -> Drawn:
        """A resource on a time line: its curve, what is free in each cell, and what stands on
        it.
        """
        most = capacity(place)
        width = {'day': 900, 'week': 3600, 'month': 10800}[view]
        levels = peaks(place.id, begin, width, -(-(end - begin) // width), most.names)
        limits = {name: n for name, n in in_figures(most).items() if n is not None}
        highest = max((each.vms for each in levels), default=0)
        shares = [share_of(in_figures(each), limits, highest) for each in levels]
        filled = [told_free(cell,
                            levels[(cell.begin
                                    - begin) // width:-(-(cell.until - begin) // width)], limits)
                  for cell in cells]
        bars, lanes = bars_of(visit, found, begin, end)
        changes = [(each['start'].timestamp(), each['end'].timestamp(), each['reason'])
                   for each in visit.service.maintenance_list(place.name)]
        closed = [Bar(*extent(start, until, begin, end), why) for start, until, why in changes
                  if start < end and until > begin]
        holds = ', '.join(f'{n} {name}' for name, n in limits.items()) or 'without a limit'
        least = min((each for each in filled if each.free), key=lambda each: int(each.free),
                    default=None)
        summary = (f"at least {least.free} {least.unit or 'vms'} free at any time" if least
                   else 'nothing limits it')
        opened = not limits or all(limits.values())
        return Drawn(place.name, holds, summary, bool(limits), opened, curve(shares), filled,
                     closed, bars,
                     68 + 21 * lanes, len(found) - len(bars))

    # Reservations

    def list(self, visit: Visit, given: dict):
        """One's own reservations, an admin's all, with what can be done to them."""
        after, over = given.get('after', ''), 'over' in given
        after = after if re.fullmatch('([0-9]{1,11}-)?[0-9]{1,18}', after) else ''
        service = visit.service
        lines = service.over if over else lambda after, most: service.list(limit=most, after=after)
        found = lines(after, MOST_LINES_SHOWN)
        last = f"{int(found[-1]['start'].timestamp())}-{found[-1]['id']}" if found else ''
        return self.page(visit, 'Reservations', render_page(
            'list', visit=visit, lines=self.lines(visit, found), over=over,
            after=last if last and lines(last, 1) else ''))

    def lines(self, visit: Visit, found: list[dict]) -> list[dict]:
        """Reservations with their addresses, how late they were ready, and what can be done to
        them.
        """
        servers: dict = defaultdict(list)
        for each in rows('SELECT occurrence_id, addresses, ready, planned FROM server WHERE '
                         'occurrence_id IN '
                         '(SELECT value FROM json_each(?))',
                         json.dumps([each['id'] for each in found])):
            servers[each.occurrence_id].append(each)
        return [each | {'addresses': sum((json.loads(server.addresses)
                                          for server in servers[each['id']]), []),
                        'late': lateness_of(servers[each['id']]), 'deeds': visit.deeds(each),
                        'href': visit.href(each['label'], each['project'])} for each in found]

    def reservation(self, visit: Visit, label: str, given: dict):
        """All of one reservation; what is live in it is loaded again and again."""
        try:
            found, live, occurrence = self.shown(visit, label, given)
        except Conflict:  # it is in several projects
            found = {'parts': visit.service.list(label)}
        if 'parts' in found:
            project = found['parts'][0]['project']
            whole = [visit.deed(deed, {'label': label, 'project': project}, True)
                     for deed in ('extend', 'delete')] if 'label' in found and visit.writes else []
            return self.page(visit, label, render_page('list', visit=visit,
                                                       lines=self.lines(visit, found['parts']),
                                                       after=0, over=None) + ''.join(whole))
        query = {'project': found['project']} | ({'occurrence': occurrence} if occurrence else {})
        running = found['tz'] and found['state'] in ('starting', 'active', 'degraded')
        only = occurrence or (to_plain(found['start']) if running else '')
        return self.page(visit, label, render_page(
            'reservation', visit=visit, found=found, live=live, href=f'/r/{quote(label)}',
            query=f'?{urlencode(query)}',
            back=visit.href(label, found['project']), over=(*OVER, 'ending'), occurrence=only,
            tag=hashed(live)[:20],
            **{name: local_time(found[name], visit.zone) for name in ('start', 'end')}))

    def live(self, visit: Visit, label: str, given: dict):
        """What is live of a reservation's page, if it is another than the browser has."""
        import bottle
        text = self.shown(visit, label, given)[1]
        tag = f'"{hashed(text)[:20]}"'
        same = tag == header(bottle.request, 'If-None-Match')
        return answered('' if same else text, 304 if same else 200, {'ETag': tag})

    def shown(self, visit: Visit, label: str, given: dict) -> tuple[dict, str, str]:
        """A reservation, its live part, and the occurrence that was asked for."""
        asked = {name: given[name] for name in ('project', 'occurrence') if given.get(name)}
        found = visit.service.show(**bind(API['show'], asked | {'label': label}, visit.here))
        if 'parts' in found:
            return found, '', ''
        facts = [('Machines', f"{found['vms']} {found['flavor']} {found['image']}"),
                 ('Resource', found['resource']),
                 ('Waits for approval', found.get('change')),
                 ('Host', found['host']), ('Owner', f"{found['user']} in {found['project']}"),
                 ('From', found['start']), ('To', found['end']), ('Repeats', found['repeat']),
                 ('At the end', found['at_end'] if found['image'] or found['server'] else ''),
                 ('Part of', found['request']), ('Description', found['description'])]
        events, occurrence = visit.service.events(label, found['project'],
                                                  limit=50)[::-1], asked.get('occurrence', '')
        deeds = [visit.deed(each, found, True,
                            occurrence if each in ('extend', 'skip', 'delete') else '')
                 for each in visit.deeds(found)]
        facts = [(name, visit.cell(value)) for name, value in facts if value]
        return found, render_page('live', visit=visit, found=found, events=events,
                                  late=lateness_told, deeds=deeds,
                                  facts=facts), occurrence

    # Booking

    def book(self, visit: Visit, given: dict):
        """The form, filled in with what was clicked on, and whether that fits."""
        said = self.filled(visit, given)
        checked = self.tried(visit, said) if given.get('start') or given.get('resource') else {}
        return self.booking(visit, said, checked)

    def booking(self, visit: Visit, said: dict, checked: dict, status: int = 200):
        """The page with the form."""
        names, why = self.offered(visit, said['resource'])
        return self.page(visit, 'Book', render_page(
            'book', visit=visit, said=said,
            places=[each.name for each in visit.service.look.places()],
            ends=ENDS, usual_rules=USUAL_RULES, names=names, why=why, more=MORE,
            verdict=self.verdict(**checked)), status)

    def verdict(self, fits: str = '', refusal: str | None = None, offers: Iterable = (),
                warnings: Iterable = ()) -> str:
        """What the form says of itself: it fits, or why not and what would."""
        return render_page('verdict', fits=fits, refusal=refusal, offers=[*offers],
                           warnings=[*warnings])

    def offered(self, visit: Visit, resource: str) -> tuple[dict, str]:
        """The names of flavors and images on a resource's cloud, and why there are none."""
        place = row('SELECT * FROM resource WHERE name = ? AND removed IS NULL', resource)
        if not visit.writes or not place or not place.cloud:
            return {'flavor': [], 'image': []}, ''
        clouds, project = self.service.clouds, visit.actor.project
        account = clouds.account(place.cloud, project)
        sight = clouds.sight(account, project, admin=visit.actor.role == ADMIN)
        return self.names.of(account, sight)

    def filled(self, visit: Visit, given: dict) -> dict:
        """The fields of the form: as given, times as clocks show them there; what was clicked on,
        not before now.
        """
        hour = visit.here.now.replace(minute=0, second=0) + timedelta(hours=1)
        start = (read_argument('start', given['start'], When, visit.here) if given.get('start')
                 else hour)
        start = visit.here.now + start if isinstance(start, timedelta) else start
        start = max(start, visit.here.now) if 'label' not in given else start
        end = (read_argument('end', given['end'], When, visit.here) if given.get('end')
               else timedelta(hours=1))
        end = start + end if isinstance(end, timedelta) else max(end, start + timedelta(minutes=1))
        places = visit.service.look.places()
        return dict.fromkeys(BOOKING, '') | {'resource': places[0].name if places else '',
                                             'vms': '1'} | {
            name: given[name] for name in BOOKING if given.get(name)} | {
            'start': local_time(start, visit.zone), 'end': local_time(end, visit.zone)}

    def asked(self, visit: Visit, said: dict) -> dict:
        """The arguments of `add` that the fields stand for."""
        given = {name: said[name] for name in BOOKING if said.get(name)}
        return bind(API['add'], given | {'tz': visit.zone.key}, visit.here)

    def tried(self, visit: Visit, said: dict) -> dict:
        """Whether it fits, and if not, what would: the values of the verdict."""
        why = (self.offered(visit, said.get('resource', ''))[1] if said.get('flavor')
               or said.get('image') else '')
        if why:  # nobody waits for that cloud before they book
            return {'refusal': f'not checked: {why}; to book asks once more'}
        try:
            answer = visit.service.add(**self.asked(visit, said | {'label': said.get('label')
                                                                   or self.unused_label}),
                                       dry_run=True)
            return {'fits': self.told(visit, answer), 'warnings': answer.get('warnings', ())}
        except Error as error:
            return {'refusal': str(error), 'offers': self.offers(visit, said, error)}

    @property
    def unused_label(self) -> str:
        """A label for a dry run of what has none yet."""
        return f'new-{secrets.token_hex(4)}'

    def told(self, visit: Visit, answer: dict) -> str:
        """What would be, of the answer of a dry run."""
        taken = [each for each in answer.get('occurrences', ()) if each['outcome'] != 'left out']
        words = (f"{answer['vms']} vms on {answer['resource']} from {visit.plain(answer['start'])} "
                 f"to {visit.plain(answer['end'])}")
        if 'occurrences' in answer:
            left_out = len(answer['occurrences']) - len(taken)
            rest = f'; {left_out} times it does not fit and is left out' if left_out else ''
            return (f'It fits: {len(taken)} times, the first {words}, the last on '
                    f'{visit.plain(taken[-1]["start"])}{rest}')
        if answer['state'] == 'waiting':
            return f'It does not fit now, and will wait: {words}'
        approval = '; an admin must approve it' if answer['state'] == 'pending' else ''
        return f'It fits: {words}{approval}'

    def offers(self, visit: Visit, said: dict, error: Error) -> Iterator[tuple[str, str]]:
        """Links to the same form with what would fit; each was tried."""
        for words, other in self.offered_instead(visit, said, error):
            other = {name: to_plain(each) if isinstance(each, datetime) else each
                     for name, each in other.items()}
            wish = {name: value for name, value in (said | other).items() if value}
            try:
                visit.service.add(**self.asked(visit, wish | {'label': self.unused_label}),
                                  dry_run=True)
            except Error:
                continue
            yield f"/book?{urlencode(wish | {'label': said.get('label', '')})}", words

    def offered_instead(self, visit: Visit, said: dict, error: Error) -> Iterator[tuple[str, dict]]:
        """What might fit instead of a wish, in words and as other fields of the form."""
        try:
            start, end = (from_wall(datetime.fromisoformat(said[name]), visit.zone)
                          for name in ('start', 'end'))
        except (KeyError, ValueError):
            return
        if 'most_vms' in error.details:
            most = str(error.details['most_vms'])
            yield f'{most} machines then', {'vms': most}
        if 'longest' in error.details:
            longest = error.details['longest']
            yield f'for {longest} only', {'end': start + parse_duration(longest)}
        if said.get('repeat') and isinstance(error, NoCapacity):
            yield 'where it fits, without the others', {'on_conflict': 'skip'}
        elif isinstance(error, NoCapacity):
            for slot in self.slots(visit, said, start, end):
                begin = slot['start']
                yield f'from {visit.plain(begin)}', {'start': begin, 'end': begin + (end - start)}

    def slots(self, visit: Visit, said: dict, start: datetime, end: datetime) -> list[dict]:
        """The next free slots for a wish; none where that can't be told."""
        try:
            return visit.service.find(said['resource'], end - start, int(said['vms']),
                                      said.get('flavor', ''),
                                      after=start, limit=3)
        except Error:
            return []

    def check(self, visit: Visit, given: dict):
        """The verdict alone, also on what can't be read."""
        return answered(self.verdict(**self.tried(visit, given)))

    def add(self, visit: Visit, given: dict):
        """Books what the form says, or with its other button only checks it."""
        said = {name: given.get(name, '') for name in BOOKING}
        checked, status = self.tried(visit, said) if 'check' in given else {}, 200
        if 'check' not in given:
            try:
                found = visit.service.add(**self.asked(visit, said))
                about = found.get('parts', [found])[0]
                warnings = ''.join(f'; {each}' for each in found.get('warnings', ()))
                return self.onward(visit.href(found['label'], about['project']),
                                   f"'{found['label']}' is {about['state']}{warnings}")
            except Error as error:
                checked, status = {'refusal': str(error),
                                   'offers': [*self.offers(visit, said, error)]}, error.status
        try:
            said = self.filled(visit, given)
        except Error:  # what can't be read stands there as it was typed
            pass
        return self.booking(visit, said, checked, status)

    # Admins, and all forms

    def admin(self, visit: Visit, given: dict):
        """What an operator looks after."""
        service = visit.service
        if visit.actor.role != ADMIN:
            raise Forbidden('this page needs the role admin; '
                            f'{visit.actor.user} is {visit.actor.role}')
        tokens = [each for each in service.token_list() if not each['revoked']]
        late = service.punctuality()
        sections = (
            ('Resources', service.resource_list(),
             'name cell cloud region aggregate vms vcpus ram classes mode',
             ('resource_delete',), ('resource_add', 'resource_update')),
            ('Maintenance', service.maintenance_list(),
             'id resource start end vms vcpus ram reason',
             ('maintenance_delete',), ('maintenance_add',)),
            ('Pending', service.awaiting_approval(),
             'label user project resource vms start end change',
             ('approve', 'reject'), ()),
            ('Waiting', service.list(state=['waiting']),
             'label user project resource vms start end', ('delete',), ()),
            ('Tokens', tokens, TOKEN_COLUMNS, ('token_revoke',), ('token_add',)),
            ('Limits', service.limit_list(),
             'id project user resource most_vms longest ahead least_notice vcpu_hours '
             'waiting exempt', ('limit_delete',), ('limit_add',)),
            ('Punctuality of the last 30 days, in seconds', late['clouds'],
             'cloud servers begun_median begun_95 '
             'begun_worst ready_median ready_95 ready_worst tried_again', (), ()),
            ('Failed', late['failed'], 'cloud label name tries planned fault', (), ()))
        return self.page(visit, 'Admin', '\n'.join(self.section(visit, *each) for each in sections))

    def tokens(self, visit: Visit, given: dict):
        """One's own tokens: what for, until when; made, renewed and revoked here."""
        me = (visit.actor.user, visit.actor.project)
        own = [each for each in visit.service.token_list()
               if not each['revoked'] and (each['user'], each['project']) == me]
        deeds = () if visit.actor.scopes else ('token_renew', 'token_revoke')
        forms = () if visit.actor.scopes else ('token_add',)
        return self.page(visit, 'Tokens', self.section(
            visit, 'Your tokens', own, TOKEN_COLUMNS, deeds, forms))

    def section(self, visit: Visit, name: str, lines: list, columns: str, deeds: tuple,
                forms: tuple) -> str:
        """One part of the admin's page: a table, and the forms that belong to it."""
        table = render_page('table', visit=visit, name=name, lines=lines, columns=columns.split(),
                            deeds=deeds)
        return f'<h2>{name}</h2>{table}' + ''.join(render_page(
            'form', visit=visit, operation=each, title=TITLES[each], summary=API[each].summary,
            once=secrets.token_hex(8), fields=[
                (field, WORDS[field], API[each].parameters[field].default is REQUIRED,
                 PICKS.get(field))
                for field in FORMS[each]])
            for each in forms)

    def do(self, visit: Visit, name: str, given: dict):
        """Whatever a form asks for: an operation by its name, its fields read as those of REST
        are.
        """
        operation = API.get(name)
        if not operation or not operation.changes:
            raise NotFound(f"there is no operation '{name}' that changes something")
        onward, sure, once = local(given.get('next')), given.pop('sure', ''), given.pop('once', '')
        said = {field: value for field, value in given.items() if field != 'next'}
        if name in ASKS and not sure:
            return self.page(visit, 'Are you sure?', render_page(
                'sure', visit=visit, operation=name, fields=given, words=DEEDS[name][0],
                back=onward,
                warnings=self.warned(visit, operation, said) if name == 'delete' else [],
                about=said.get('label') or said.get('name') or said.get('id'),
                which=said.get('occurrence')))
        # What a form has shown and nobody has changed is not asked for.
        said = {field: value for field, value in said.items()
                if value != '' and not field.startswith('was_')
                and said.get(f'was_{field}') != value}
        if 'tz' in operation.parameters:
            said.setdefault('tz', visit.zone.key)
        if once and once in self.sent:  # else loading the answer again makes another secret
            raise Conflict('this form was sent already, and what it made is not shown again; go '
                           'back to the form')
        answer = getattr(visit.service, name)(**bind(operation, said, visit.here))
        if secret := SECRET & set(answer if isinstance(answer, dict) else ()):
            self.sent.append(once)
            return self.page(visit, 'Done', render_page(
                'secret', words=told_done(name, said, answer), secret=answer[secret.pop()],
                back=onward))
        return self.onward(onward, told_done(name, said, answer))

    def warned(self, visit: Visit, operation: Operation, said: dict) -> list[str]:
        """What a delete would warn of, if it were meant."""
        said = {field: value for field, value in said.items() if value != ''}
        bound = bind(operation, {'tz': visit.zone.key} | said | {'dry_run': True}, visit.here)
        gone = visit.service.delete(**bound)
        return [warning for each in gone for warning in each.get('warnings', ())]


def told_done(name: str, said: dict, answer) -> str:
    """What a form has done, in a sentence."""
    name = 'undo' if said.get('undo') else name
    about = (said.get('rename') or said.get('label') or said.get('name') or said.get('id')
             or said.get('user') or '')
    hit = answer.get('hit', []) if isinstance(answer, dict) else []
    told = ', '.join(f"{each['label']} of {each['user']} ({each['outcome']})" for each in hit[:20])
    gone = answer if name == 'delete' else ()
    warned = [warning for each in gone for warning in each.get('warnings', ())]
    done = f"'{about}' {DONE[name]}" if name in DONE else f'done: {API[name].words} {about}'
    return '; '.join([done, *warned]) + (
        f'; {len(hit)} were in the way: {told}' if hit else '')


def arguments_told(entry: dict) -> list[tuple]:
    """The arguments of an operation: each with where it stands, if it is needed, kind, meaning."""
    body = entry.get('requestBody', {'content': {'application/json': {'schema': {}}}})
    shape = body['content']['application/json']['schema']
    needed = shape.get('required', ())
    found = [(each['name'], each['in'], each.get('required', False), each)
             for each in entry['parameters'] if 'in' in each]
    found += [(name, 'body', name in needed, {'schema': each} | each)
              for name, each in shape.get('properties', {}).items()]
    return [(*head, kind_told(each['schema']), each['description']) for *head, each in found]


def kind_told(schema: dict) -> str:
    """A schema in a few words: the name of a kind, or what it is of."""
    if '$ref' in schema:
        return schema['$ref'].rpartition('/')[2]
    if 'anyOf' in schema:
        return ' or '.join(dict.fromkeys(kind_told(each) for each in schema['anyOf']))
    if 'enum' in schema:
        return ', '.join(each for each in schema['enum'] if each)
    if schema.get('type') == 'array':
        return f"list of {kind_told(schema['items'])}"
    found = schema.get('format') or schema.get('pattern') or schema.get('type', 'anything')
    return found if isinstance(found, str) else ' or '.join(found)


def answered(text: str, status: int = 200, headers: dict | None = None):
    """An answer of the page, with the headers that guard it."""
    import bottle
    return bottle.HTTPResponse(text, status, SAFE | (headers or {}))


def read_form(request) -> dict:
    """The fields of a form (application/x-www-form-urlencoded), each once."""
    return fields_of(whole_body(request), 'form')


def local(href: str | None) -> str:
    """An address on this site; whatever leads elsewhere becomes the first page."""
    return href if href and re.fullmatch(r'/(?![/\\])[!-\[\]-~]*', href) else '/'


def local_time(moment: datetime, zone: ZoneInfo) -> str:
    """A time as a form's field has it."""
    return to_wall(moment, zone).isoformat(timespec='minutes')


def read_date(text: str | None) -> date | None:
    """A date that is in an address; None if it is none."""
    try:
        day = date.fromisoformat(text or '')
        return day if 1971 <= day.year < 2199 else None
    except ValueError:
        return None


def span_of_view(view: str, day: date) -> tuple[date, date]:
    """The first day that is shown, and the first that is not any more."""
    if view == 'month':
        first = day.replace(day=1)
        return first, (first + timedelta(days=31)).replace(day=1)
    first = day - timedelta(days=day.weekday() if view == 'week' else 0)
    return first, first + timedelta(days=VIEWS[view])


def named_span(view: str, first: date, after: date) -> str:
    """What a time line shows, in words."""
    last = after - timedelta(days=1)
    return (f'{first:%B %Y}' if view == 'month' else f'{first:%A} {first.day} {first:%B %Y}'
            if view == 'day' else
            f'{first.day} {first:%b} to {last.day} {last:%b %Y}')


def cells_of(view: str, first: date, after: date, zone: ZoneInfo) -> list[Cell]:
    """The days of a time line, or of one day every third hour."""
    begin, end = (from_wall(at_midnight(each), zone).timestamp() for each in (first, after))
    walls = [at_midnight(first) + timedelta(hours=hour) for hour in (
        range(0, 24, 3) if view == 'day' else range(0, 24 * (after - first).days, 24))]
    ends = [from_wall(each, zone).timestamp() for each in walls[1:]] + [end]
    return [Cell(*extent(from_wall(wall, zone).timestamp(), until, begin, end),
                 int(from_wall(wall, zone).timestamp()),
                 int(until),
                 f'{wall:%H:%M}' if view == 'day' else f'{wall.day}' if view == 'month' else
                 f'{wall:%a} {wall.day}', wall.isoformat(timespec='minutes').removesuffix('T00:00'))
            for wall, until in zip(walls, ends)]


def told_free(cell: Cell, levels: list[Amount], limits: dict[str, int]) -> Cell:
    """A cell with how much of the scarcest figure is free in it at any time."""
    if not limits:
        return cell._replace(words=cell.name)
    used = [in_figures(each) for each in levels]
    free = {name: limit - max(each.get(name, 0) for each in used) for name, limit in limits.items()}
    scarcest = min(free, key=lambda name: free[name] / limits[name] if limits[name] else 0)
    least = max(free[scarcest], 0)
    return cell._replace(words=f'{cell.name}: {least} of {limits[scarcest]} {scarcest} free',
                         free=str(least),
                         unit='' if scarcest == 'vms' else scarcest)


def percent(at: float, begin: float, end: float) -> float:
    """Where an instant is on a time line, in percent of its width."""
    return round(100 * (min(max(at, begin), end) - begin) / (end - begin), 3)


def extent(start: float, until: float, begin: float, end: float) -> tuple[float, float]:
    """Where a window is on a time line, and how wide, in percent."""
    left = percent(start, begin, end)
    return left, round(percent(until, begin, end) - left, 3)


def share_of(held: dict[str, int], limits: dict[str, int], highest: int) -> float:
    """How full a resource is, 0 to 1; where nothing limits it, against the highest that is
    shown.
    """
    shares = [held.get(name, 0) / limit if limit else 1.0 for name, limit in limits.items()]
    return min(max(shares) if shares else held['vms'] / (1.6 * highest or 1), 1)


def in_brief_figures(figure: str) -> str:
    """A figure as short as a column of a month has room for."""
    n = int(figure)
    return figure if n < 1000 else f'{n // 1000}k' if n < 1_000_000 else f'{n // 1_000_000}M'


def curve(shares: list[float]) -> str:
    """The area under a step function, as the path of a drawing that is 1000 wide and 50 high."""
    path, before = ['M0 50'], 0.0
    for number, share in enumerate(shares):
        if share != before:
            path.append(f'H{round(1000 * number / len(shares), 1):g}V{round(50 - 50 * share, 1):g}')
            before = share
    return ''.join(path) + 'H1000V50Z'


def bars_of(visit: Visit, found: list, begin: int, end: int) -> tuple[list[Bar], int]:
    """Reservations as bars in lanes, none over another, and the number of lanes; what finds no lane
    is not drawn.
    """
    lanes: list[float] = []  # until where each is taken, in percent
    bars = []
    for each in found:
        left, width = extent(each.start, each.end, begin, end)
        width = max(width, THINNEST)
        first, last = left, left + width + (ROOM if width < ROOM else 0)
        if last > 100 and width < ROOM:
            first, last = left - ROOM, left + width
        lane = next((n for n, until in enumerate(lanes) if until <= first), len(lanes))
        if lane == MOST_LANES:
            continue
        lanes[lane:lane + 1] = [last]
        mine = each.project == visit.actor.project
        kind = ('own' if mine else 'other') + (' dashed' if mine
                                               and each.state in ('waiting', 'pending') else '')
        text = f'{SIGNS[each.state]} {each.label}'
        words = (f'{each.label}, {each.state}, {each.vms} vms {each.flavor}, '
                 f'{visit.plain(instant(each.start))} to '
                 f'{visit.plain(instant(each.end))}, {each.user}')
        start = instant(each.start) if each.repeats else None
        bars.append(Bar(left, width, words, 68 + 21 * lane, text,
                        visit.href(each.label, each.project, start), kind))
    return bars, len(lanes)


def lateness_of(servers: list) -> str:
    """How late the last of some servers was ready, in words."""
    late = [max(each.ready - each.planned, 0) for each in servers if each.ready]
    return f'ready {format_duration(round(max(late)))} after the start' if late else ''


def lateness_told(server: dict) -> str:
    """How late one server was ready, in words."""
    late = server['ready'] and (server['ready'] - server['planned']).total_seconds()
    return '' if late is None else f'{format_duration(round(max(late, 0)))} after the start'


LOOK = hashed(STYLE + SCRIPT + ''.join(TEMPLATES.values()))[:12]


def web(service: Reservations):
    """The WSGI application of a service: REST and the page."""
    import bottle
    pages = Pages(service)

    def told(failure):
        request, sentence = bottle.request, error_text(failure, bottle.request, bottle.response)
        for_people = 'text/html' in header(request, 'Accept')
        if not sentence or not for_people or request.path.startswith((BASE, '/calendar/')):
            return sentence
        for name, value in SAFE.items():
            bottle.response.set_header(name, value)
        body = render_page('refused', sentence=json.loads(sentence)['error'], back='/')
        title = 'Not available' if failure.status_code >= 500 else 'Not here'
        return render_page('layout', title=title, body=body, visit=pages.anybody(request), note='',
                           here='', version=LOOK, back='/')
    app = rest(service, told, lambda request: pages.visit(request).actor)
    pages.mount(app)
    return app


# Serving #####################################################################
#
# What `serve` does beside answering: it bounds connections, ends in good order, tells systemd how
# it is, reads settings again, and writes down now and then what was counted meanwhile.

EVERY = 5            # seconds between two rounds of the housekeeper
SILENT = 30          # seconds between two looks at connections that do nothing
AUDIT_EVERY = 60     # seconds between two events that tell of wrong tokens
MOST_ADDRESSES = 10  # that one such event names
#: What is read once: sockets, threads, files and what hangs on them.
NEEDS_RESTART = frozenset(
    'database key host port threads slow_per_user slow_per_target outside_timeout url token '
    'timezone workers call_timeout sweep verify_every connections'.split())
#: Settings that only their owner may read.
SECRETS = frozenset(('token', 'webhook', 'webhook_secret'))


class Connections:
    """The open connections, the oldest first. Where there are too many, the oldest idle one goes.

    Whoever comes last is let in: so an address that opens thousands of them loses only its own.
    """

    def __init__(self, config: Config):
        self.config = config
        self.all: dict = {}
        self.of: dict[str, dict] = defaultdict(dict)

    def add(self, channel, peer: str) -> None:
        """Notes a new connection from an address, and closes the one that is too many."""
        channel.peer = peer
        for setting, those in (('connections_per_address', self.of[peer]),
                               ('connections', self.all)):
            those[channel] = None
            if len(those) > getattr(self.config, setting):
                self.close_one(those, setting)

    def close_one(self, those: dict, setting: str) -> None:
        """Closes the oldest connection on which nothing is being answered."""
        channel = next(each for each in those if not each.requests)  # at least the newest
        METRICS.count('connections_closed_total', setting=setting)
        self.drop(channel)
        channel.will_close = True
        hang_up(channel.socket)  # so that it is looked at, also if its client reads nothing

    def drop(self, channel) -> None:
        """Forgets a connection that is closed."""
        self.all.pop(channel, None)
        mine = self.of.get(channel.peer, {})
        mine.pop(channel, None)
        if not mine:
            self.of.pop(channel.peer, None)


class Watch:
    """Waits for sockets by epoll. waitress asks each of them at every turn whether it has anything
    to do, which thousands of idle connections make slow; here those at rest are not asked.
    """

    def __init__(self, sockets: dict):
        import select
        self.sockets, self.epoll = sockets, select.epoll()
        self.flags: dict[int, int] = {}  # what each is waited for
        self.awake = set(sockets)        # those that are asked at the next turn

    def add(self, fd: int) -> None:
        """Asks a new socket from now on; its number may be that of one before it."""
        self.flags.pop(fd, None)
        self.awake.add(fd)

    def turn(self, timeout: float) -> None:
        """Reads and writes what can be."""
        from waitress.wasyncore import readwrite
        for fd in [*self.awake]:
            self.ask(fd)
        for fd, events in self.epoll.poll(timeout):
            if each := self.sockets.get(fd):
                self.awake.add(fd)
                readwrite(each, events)

    def ask(self, fd: int) -> None:
        """Waits for what a socket needs next; one at rest is not asked again before that comes."""
        import select
        each = self.sockets.get(fd)
        if each is None or self.is_at_rest(each):
            self.awake.discard(fd)
        if each is None:
            return
        reads = select.EPOLLIN | select.EPOLLPRI if each.readable() else 0
        writes = select.EPOLLOUT if each.writable() and not each.accepting else 0
        if (flags := reads | writes) != self.flags.get(fd):
            (self.epoll.modify if fd in self.flags else self.epoll.register)(fd, flags)
            self.flags[fd] = flags

    def is_at_rest(self, each) -> bool:
        """Whether a connection changes only by what comes from its client."""
        return hasattr(each, 'requests') and not (
            each.requests or each.total_outbufs_len or each.will_close or each.close_when_flushed)


def channels_in(connections: Connections, watch: Watch) -> type:
    """waitress' kind of connection, which says when it begins and ends."""
    from waitress.channel import HTTPChannel

    class Channel(HTTPChannel):
        peer = ''

        def __init__(self, server, sock, addr, adj, map=None):
            super().__init__(server, sock, addr, adj, map=map)
            watch.add(self._fileno)
            connections.add(self, network_of(addr[0]))

        def del_channel(self, map=None):
            watch.flags.pop(self._fileno, None)
            super().del_channel(map)
            connections.drop(self)
    return Channel


class Front:
    """The sockets of a server, from its first turn until the last answer is sent."""

    def __init__(self, app: Callable, config: Config):
        import waitress
        allow_files(config.connections + 500)
        self.config, self.turned = config, time.monotonic()
        self.leaving = threading.Event()
        self.server = waitress.create_server(
            app, host=config.host, port=config.port, asyncore_use_poll=True,
            _dispatcher=fair_dispatcher(config.threads),
            connection_limit=config.connections + 100, max_request_body_size=4 * MOST_ICS,
            ident=None,
            channel_request_lookahead=1, clear_untrusted_proxy_headers=False)
        self.port = getattr(self.server, 'effective_port', config.port)
        self.sockets = getattr(self.server, 'map', None) or self.server._map
        self.doors = [each for each in self.sockets.values() if getattr(each, 'accepting', False)]
        self.watch, self.looked = Watch(self.sockets), time.monotonic()
        kind = channels_in(Connections(config), self.watch)
        for each in self.doors:
            each.channel_class = kind

    def leave(self) -> None:
        """Lets the server end; the second time at once."""
        if self.leaving.is_set():
            raise SystemExit(0)
        self.leaving.set()
        self.doors[0].pull_trigger()

    def turn(self) -> None:
        """Reads and writes what can be, for a second at most."""
        self.turned = time.monotonic()
        if self.leaving.is_set() or self.turned > self.looked + SILENT:
            self.looked = self.turned
            self.watch.awake.update(self.sockets)  # waitress closes those that are silent for long
        self.watch.turn(1)

    def run(self) -> None:
        """Serves until it is to leave, and then until all is answered, or `drain` is over."""
        while not self.leaving.is_set():
            self.turn()
        tell_systemd('STOPPING=1')
        for each in self.doors:
            self.server.asyncore.dispatcher.close(each)
        until = time.monotonic() + self.config.drain
        while (busy := self.busy()) and time.monotonic() < until:
            self.turn()
        if busy:
            log.warning('%d requests were not answered within %g seconds', busy, self.config.drain)
        self.server.task_dispatcher.shutdown(timeout=0 if busy else 5)
        self.server.asyncore.close_all(self.sockets, ignore_all=True)

    def busy(self) -> int:
        """How many connections have something to be answered; the others are closed."""
        found = [each for each in self.sockets.values() if hasattr(each, 'requests')]
        for each in found:
            each.will_close = each.will_close or not (each.requests or each.total_outbufs_len)
        return sum(not each.will_close for each in found)


def allow_files(number: int) -> None:
    """Lets this process open so many files, as far as it may."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Alert(NamedTuple):
    """One rule of Prometheus: when it holds for so long, somebody is told."""
    name: str
    holds: str
    lasts: str
    severity: str
    summary: str


ALERTS = (
    Alert('CmresDown', 'up{job="cmres"} == 0 or absent(up{job="cmres"})', '2m', 'page',
          'cmres does not answer Prometheus: nobody can reserve, and nothing may start'),
    Alert('CmresStandsStill', 'cmres_pass_age_seconds > 180 or absent(cmres_leader)', '2m', 'page',
          'No life cycle makes passes: no VM is started or ended. See the log of the scheduler'),
    Alert('CmresCloudIll', 'cmres_cloud_left_alone == 1', '5m', 'page',
          'The cloud {{ $labels.cloud }} fails again and again and is left alone for a while'),
    Alert('CmresStartsFail', 'increase(cmres_events_total{code="failed"}[1h]) > 0', '0m', 'ticket',
          'A reservation was over and its VMs were never up'),
    Alert('CmresStartsLate', 'histogram_quantile(0.95, sum by (le, cloud) '
          '(increase(cmres_start_delay_seconds_bucket[1h]))) > 300', '10m', 'ticket',
          'VMs on {{ $labels.cloud }} are ready more than five minutes late'),
    Alert('CmresErrors', 'sum(rate(cmres_requests_total{status=~"5.."}[5m])) > '
          '0.02 * sum(rate(cmres_requests_total[5m]))', '5m', 'page',
          'One request in fifty or more ends in an error of the server'),
    Alert('CmresSlow', 'histogram_quantile(0.9, sum by (le) '
          '(rate(cmres_request_seconds_bucket[5m]))) > 2', '10m', 'ticket',
          'One request in ten takes longer than two seconds'),
    Alert('CmresNoticesStuck', 'cmres_notice_age_seconds > 900', '5m', 'ticket',
          'Mails or webhooks are not delivered. See the event log and the mail server'),
    Alert('CmresStoreInDanger', 'cmres_disk_free_bytes < 5e8 or cmres_store_damaged == 1', '1m',
          'page', 'The disk of the database is nearly full, or the database is damaged'),
    Alert('CmresGuessed', 'rate(cmres_wrong_tokens_total[5m]) > 1', '5m', 'ticket',
          'Somebody tries tokens. The event log tells from where'))

#: The charts of the dashboard: title, unit, and of each line what it shows and its name.
CHARTS = (
    ('Requests', 'reqps', (('sum by (status) (rate(cmres_requests_total[5m]))', '{{status}}'),)),
    ('Answered within', 's', tuple(
        (f'histogram_quantile({share}, sum by (le) (rate(cmres_request_seconds_bucket[5m])))', name)
        for share, name in ((0.5, 'half'), (0.95, '95 %'), (0.99, '99 %')))),
    ('Reserved now, of capacity', 'percentunit', (
        ('cmres_used{class="vms"} / cmres_capacity{class="vms"}', '{{resource}}'),)),
    ('VMs by state', 'short', (('sum by (cloud, state) (cmres_servers)', '{{cloud}} {{state}}'),)),
    ('Reserved and refused', 'short', (
        ('increase(cmres_events_total{code=~"added|admitted"}[1h])', '{{code}}'),
        ('increase(cmres_refusals_total[1h])', 'refused: {{kind}}'))),
    ('Waiting and pending', 'short', (
        ('cmres_reservations_waiting', 'waiting'), ('cmres_reservations_pending', 'pending'))),
    ('VMs ready after their planned start', 's', tuple(
        (f'histogram_quantile({share}, sum by (le, cloud) '
         '(increase(cmres_start_delay_seconds_bucket[1h])))', f'{{{{cloud}}}} {name}')
        for share, name in ((0.5, 'half'), (0.95, '95 %')))),
    ('Calls to clouds', 'reqps', (
        ('sum by (cloud, verb, result) (rate(cmres_cloud_call_seconds_count[5m]))',
         '{{cloud}} {{verb}} {{result}}'),)),
    ('Last pass of the life cycle, age', 's', (('cmres_pass_age_seconds', 'age'),)),
    ('Waiting to write', 's', (
        ('histogram_quantile(0.95, sum by (le) (rate(cmres_lock_wait_seconds_bucket[5m])))',
         '95 %'),)),
    ('Database and memory', 'bytes', (
        ('cmres_store_bytes', 'database'), ('cmres_resident_bytes', 'memory'),
        ('cmres_disk_free_bytes', 'free on disk'))),
    ('Refused by limits, wrong tokens', 'short', (
        ('increase(cmres_limited_total[5m])', '{{setting}}'),
        ('increase(cmres_wrong_tokens_total[5m])', 'wrong tokens'))))


def alert_rules() -> dict:
    """The alerts as Prometheus reads them."""
    return {'groups': [{'name': 'cmres', 'rules': [
        {'alert': each.name, 'expr': each.holds, 'for': each.lasts,
         'labels': {'severity': each.severity}, 'annotations': {'summary': each.summary}}
        for each in ALERTS]}]}


def grafana_dashboard() -> dict:
    """The dashboard as Grafana imports it; it asks for the data source."""
    source = {'type': 'prometheus', 'uid': '${source}'}
    panels = [{
        'id': place + 1, 'type': 'timeseries', 'title': title, 'datasource': source,
        'gridPos': {'x': place % 2 * 12, 'y': place // 2 * 8, 'w': 12, 'h': 8},
        'fieldConfig': {'defaults': {'unit': unit, 'min': 0}, 'overrides': []},
        'targets': [{'refId': 'ABC'[at], 'expr': what, 'legendFormat': name, 'datasource': source}
                    for at, (what, name) in enumerate(lines)],
    } for place, (title, unit, lines) in enumerate(CHARTS)]
    choice = {'name': 'source', 'type': 'datasource', 'query': 'prometheus', 'label': 'Prometheus'}
    return {'title': 'cmres', 'uid': 'cmres', 'schemaVersion': 39, 'editable': True,
            'refresh': '30s', 'time': {'from': 'now-6h', 'to': 'now'},
            'templating': {'list': [choice]},
            'panels': panels}


CONTAINER = r"""
# podman build -t cmres .   (in the folder of cmres.py; docker reads it with -f Containerfile)
# podman run --read-only --tmpfs /tmp --cap-drop all --security-opt no-new-privileges \
#   -v cmres:/var/lib/cmres -p 127.0.0.1:8080:8080 --stop-timeout 40 cmres
FROM docker.io/library/python:3.13-slim
COPY cmres.py /opt/cmres/
RUN sed -n '/^# \/\/\/$/q; s/^#   "\([^"]*\)",.*/\1/p' /opt/cmres/cmres.py > /opt/cmres/needs \
 && pip install --no-cache-dir --disable-pip-version-check -r /opt/cmres/needs \
 && python -m compileall -q /opt/cmres \
 && useradd --uid 10001 --home-dir /var/lib/cmres --create-home cmres
ENV CMRES_HOST=0.0.0.0 CMRES_DATABASE=/var/lib/cmres/cmres.db CMRES_LOG_FORMAT=json \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/lib/cmres
VOLUME /var/lib/cmres
EXPOSE 8080
HEALTHCHECK --start-period=30s CMD ["python", "-c", \
  "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=5)"]
ENTRYPOINT ["python", "/opt/cmres/cmres.py"]
CMD ["serve"]
"""


def tell_systemd(text: str, environ: dict = os.environ) -> None:
    """Tells systemd how this service is, if that has started it (sd_notify)."""
    path = environ.get('NOTIFY_SOCKET', '')
    if path:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.sendto(text.encode(), '\0' + path[1:] if path.startswith('@') else path)


def watchdog_pause(environ: dict = os.environ) -> float:
    """The seconds within which systemd wants a sign of life; 0 if it wants none of this process."""
    mine = environ.get('WATCHDOG_PID', f'{os.getpid()}') == f'{os.getpid()}'
    return int(environ.get('WATCHDOG_USEC', 0)) / 10**6 if mine else 0


class Housekeeper(threading.Thread):
    """Does now and then what no request waits for; what goes wrong is tried again the next time."""

    def __init__(self, service: Reservations, cycle: LifeCycle | None = None,
                 front: Front | None = None):
        super().__init__(name='housekeeper', daemon=True)
        self.service, self.cycle, self.front = service, cycle, front
        self.wake, self.stop, self.again = threading.Event(), False, False
        self.audited = time.monotonic()
        self.pause = min(EVERY, watchdog_pause() / 3 or EVERY)

    def end(self) -> None:
        """Ends it, when what it has in hand is done."""
        self.stop = True
        self.wake.set()
        self.join(30)

    def read_again(self) -> None:
        """Lets it read the settings again; for a handler of signals."""
        self.again = True
        self.wake.set()

    def run(self) -> None:
        while not self.stop:
            self.wake.wait(self.pause)
            self.wake.clear()
            self.round()
        self.guarded(self.audit)

    def round(self) -> None:
        """One round of all that there is to do."""
        if self.again:
            self.again = False
            self.guarded(self.settings)
        shares = self.service.shares
        if shares.uses.seen:  # else no connection is made for nothing
            self.guarded(shares.uses.write)
        if shares.wrong and time.monotonic() >= self.audited + AUDIT_EVERY:
            self.audited = time.monotonic()
            self.guarded(self.audit)
        if self.is_well():
            tell_systemd('WATCHDOG=1')

    def guarded(self, deed: Callable[[], None]) -> None:
        try:
            with db.connection_context():
                deed()
        except Exception as error:  # of any kind: the next round comes
            log.warning('the housekeeper failed: %s', trouble(error) or error)

    def is_well(self) -> bool:
        """Whether requests are taken and passes are made."""
        answers = self.front is None or time.monotonic() < self.front.turned + LATE
        return answers and (self.cycle is None or self.cycle.age() < LATE)

    def audit(self) -> None:
        """Writes down where wrong tokens came from since the last time: one event for all."""
        wrong, self.service.shares.wrong = self.service.shares.wrong, Counter()
        if not wrong:
            return
        worst = ', '.join(f'{number} from {address or "somewhere"}'
                          for address, number in wrong.most_common(MOST_ADDRESSES))
        more = len(wrong) - MOST_ADDRESSES
        others = f', and from {more} other addresses' if more > 0 else ''
        with transaction():
            journal(self.service.config, self.service.clock(), 'cmres', 'wrong_token',
                    f'{wrong.total()} wrong tokens: {worst}{others}')

    def settings(self) -> None:
        """Reads the settings again, and tells what has changed."""
        tell_systemd(f'RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}')
        try:
            for line in read_settings_again(self.service.config):
                log.info('settings: %s', line)
        except Invalid as error:
            log.warning('settings: %s; they stay as they were', error)
        tell_systemd('READY=1')


def read_settings_again(config: Config, environ: dict = os.environ) -> list[str]:
    """Reads the settings again for all who share them.

    Returns:
      what has changed, and what would have but needs a restart.

    Raises:
      Invalid: they can't be read, so that nothing has changed.
    """
    new, told = load_config(config.path or None, environ), []
    for name in (*SETTINGS, *(each for each in SECTIONS if each != 'cmres')):
        before, after = getattr(config, name), getattr(new, name)
        if before == after:
            continue
        if name in NEEDS_RESTART:
            told += [f'{name} has changed and needs a restart'] if name in new.sources else []
            continue
        told.append(f'{name} is {shown_setting(new, name)} now' if name in SETTINGS else
                    f'[{name}] has changed')
        config.take(**{name: after})
    config.take(sources=new.sources, stamp=new.stamp)
    return told


def shown_setting(config: Config, name: str) -> str:
    """A setting as people may see it."""
    value = getattr(config, name)
    if name in SECRETS and value:
        return 'set, and not shown'
    if isinstance(value, bool):
        return str(value).lower()
    return f'{value:g}' if isinstance(value, float) else f'{value}'


def note_start(service: Reservations, what: str) -> None:
    """Writes down that a process has started, and with which settings."""
    config = service.config
    said = ', '.join(f'{name}={shown_setting(config, name)}' for name in SETTINGS
                     if name in config.sources)
    try:
        with transaction():
            journal(config, service.clock(), 'cmres', 'settings',
                    f'{what} {__version__} has started; set: {said or "nothing"}')
    except (Unavailable, *STORE_ERRORS) as error:
        log.warning('the start was not written down: %s', trouble(error) or error)


# Client ######################################################################


class Client:
    """A cmres server as if it were here: the methods, signatures, answers and errors of
    Reservations.

    Args:
      url: where the server is, such as http://127.0.0.1:8080
      token: as `token add` printed it
      timeout: seconds to wait for an answer
    """

    def __init__(self, url: str, token: str, timeout: float = 60):
        self.url, self.token, self.timeout = url.rstrip('/'), token, timeout
        self.token_ends = ''  # its id and its end, if that is near

    def call(self, operation: Operation, given: dict):
        """One operation over HTTP.

        Raises:
          Error: the same kinds as the service; Unavailable if there is no answer.
        """
        from urllib.error import HTTPError, URLError
        from urllib.request import Request, urlopen
        verb, address, body = self.address(operation, to_plain(given))
        try:
            request = Request(self.url + address, body, {'Authorization': f'Bearer {self.token}'},
                              method=verb)
            if body:
                request.add_header('Content-Type', 'application/json')
            with urlopen(request, timeout=self.timeout) as answer:
                self.token_ends = answer.headers.get('X-Cmres-Token-Ends', '')
                return as_answer(json.load(answer), operation.answers)
        except HTTPError as error:
            raise self.refusal(error) from None
        except (URLError, OSError, ValueError) as error:
            why = getattr(error, 'reason', error)
            raise Unavailable(f'no answer from {self.url}: {why}') from None

    def address(self, operation: Operation, given: dict) -> tuple[str, str, bytes | None]:
        """The verb, the first of the addresses whose parts are all given, and the body."""
        given = {name: value for name, value in given.items() if value is not None}
        verb, path, _ = next(each for each in operation.routes
                             if set(re.findall(r'<(\w+)>', each[1])) <= given.keys()
                             and not each[2])
        path = re.sub(r'<(\w+)>', lambda part: quote(str(given.pop(part[1])), safe=''), path)
        if verb in ('POST', 'PATCH'):
            return verb, BASE + path, json.dumps(given).encode()
        query = {name: ','.join(value) if isinstance(value, list) else value
                 for name, value in given.items()}
        return verb, BASE + path + (f'?{urlencode(query)}' if query else ''), None

    def refusal(self, answer) -> Error:
        """The error that the server sent, of the same kind; something else's words if it wasn't
        cmres.
        """
        try:
            body = json.load(answer)
            return ERRORS.get(body.get('kind'), Error)(body['error'],
                                                       **from_plain(body.get('details', {})))
        except (ValueError, KeyError, AttributeError):
            return Unavailable(f'{self.url} answered {answer.status} {answer.reason}, which is not '
                               f'cmres')


def client_method(operation: Operation) -> Callable:
    @functools.wraps(operation.method)
    def method(self, *args, **kwargs):
        given = inspect.signature(operation.method).bind(self, *args, **kwargs).arguments
        return self.call(operation, {name: value for name, value in given.items()
                                     if name != 'self'
                                     and value != operation.parameters[name].default})
    return method


for _operation in API.values():
    setattr(Client, _operation.name, client_method(_operation))


# Nova filter #################################################################
#
# Runs inside nova-scheduler, which loads it from this file: `available_filters =
# cmres.ReservationFilter`. It asks a cmres server once per request which marked resources the
# server may boot on, and then decides for each host by the mark of its aggregates. Its settings
# stand in nova.conf under [cmres].

# Only nova-scheduler has this loaded already; nobody else must pay for it or even have it.
_nova = sys.modules.get('nova.scheduler.filters')


def nova_settings():
    """The section [cmres] of nova.conf: url, token, timeout in seconds, when_down."""
    from oslo_config import cfg
    options = [cfg.StrOpt('url', default='http://127.0.0.1:8080', help='where cmres is served'),
               cfg.StrOpt('token', default='', secret=True, help="an admin's token"),
               cfg.FloatOpt('timeout', default=2.0, min=0.1, help='seconds to wait for its answer'),
               cfg.StrOpt('when_down', default='closed', choices=['closed', 'open'],
                          help='whether marked hosts pass while there is no answer')]
    cfg.CONF.register_opts(options, group='cmres')
    return cfg.CONF.cmres


class ReservationFilter(_nova.BaseHostFilter if _nova else object):
    """Lets a server boot on the hosts of a marked aggregate only if cmres says so; others are not
    concerned.
    """

    RUN_ON_REBUILD = False

    def filter_all(self, hosts, spec):
        """Nova's own entry point: the hosts of a request that pass, asked for at once for all of
        them.
        """
        marks = [(host, self.marks(host)) for host in hosts]
        resources = sorted(set().union(*(names for _, names in marks)))
        verdicts = self.ask(resources, spec) if resources and not self.is_rebuild(spec) else {}
        for host, names in marks:
            if all(self.lets(verdicts.get(name, True), host) for name in names):
                yield host

    def lets(self, verdict: bool | list, host) -> bool:
        return host.host in verdict if isinstance(verdict, list) else verdict

    def marks(self, host) -> set[str]:
        return {each.metadata['cmres'] for each in host.aggregates if each.metadata.get('cmres')}

    def is_rebuild(self, spec) -> bool:
        return bool(spec.obj_attr_is_set('scheduler_hints') and 'rebuild' in (
            (spec.scheduler_hints or {}).get('_nova_check_type') or []))

    def ask(self, resources: list[str], spec) -> dict[str, bool | list]:
        """Whether each resource may be booted on, or on which of its hosts; a refusal is logged
        with its reason.
        """
        settings = nova_settings()
        hints = (spec.scheduler_hints or {}) if spec.obj_attr_is_set('scheduler_hints') else {}
        label = (hints.get('cmres') or [''])[0]
        try:
            answer = Client(settings.url, settings.token, settings.timeout).claim(
                spec.instance_uuid, resources, spec.project_id, spec.user_id or '',
                spec.flavor.vcpus,
                spec.flavor.memory_mb, dict(classes_of(self.extra_specs(spec.flavor))), label)
        except Error as error:
            log.warning('cmres does not answer, so its hosts are %s: %s', settings.when_down, error)
            return dict.fromkeys(resources, settings.when_down == 'open')
        for each in answer:
            if not each['passes']:
                log.info('%s may not boot on %s: %s', spec.instance_uuid, each['resource'],
                         each['why'])
        return {each['resource']: each['passes'] and (each['hosts'] or True) for each in answer}

    def extra_specs(self, flavor) -> dict:
        return (flavor.extra_specs if flavor.obj_attr_is_set('extra_specs') and flavor.extra_specs
                else {})


# Command line ################################################################
#
# Fire finds the command and its arguments; what it calls only notes the call, and the call is made
# when the whole line has been understood: a line with a mistake does nothing. Values stay the text
# that was typed until `bind` reads them.

GROUPS = {'resource': """What can be reserved: places and their capacities.

Example:
  python cmres.py resource add india --cloud simulated --vms 40
""", 'token': """Who may use cmres: tokens for programs, and to sign in to the page.

Example:
  python cmres.py token add eva --project biology --role user
""", 'user': """People who leave.

Example:
  python cmres.py user end eva
""", 'limit': """What projects and users may reserve at most.

Example:
  python cmres.py limit add --project biology --most-vms 20
""", 'maintenance': """Times at which there is less of a resource, or nothing.

Example:
  python cmres.py maintenance add demo 2027-03-01T08:00 +4h --reason 'new disks'
""", 'calendar': """Calendars that show reservations, and calendars that make them.

Example:
  python cmres.py calendar feed
""", 'config': """Settings: whether they are in order, and what is in force.

Example:
  python cmres.py config show
""", 'event': """The event log as a whole; `events` shows some of it.

Example:
  python cmres.py event export --since 2027-01-01
""", 'key': """The key that signs cookies; on this machine only.

Example:
  python cmres.py key rotate
""", 'store': """The database file: copies, checks, migrations; on this machine only.

Example:
  python cmres.py store backup cmres-monday.db
"""}

HELP = '''Reservations for virtual machines on OpenStack clouds.

Works on the local database, or with CMRES_URL and CMRES_TOKEN on a server.
Options may stand anywhere; every command also takes --config FILE, --tz ZONE and --format
table|json|csv|yaml. Tables take --columns A,B, --sort A or --sort=-A (the last first), --wide (all
columns, whatever the width), and with --watch they are shown anew every 2 seconds.
Exit codes: 0 done, 1 refused or failed, 2 wrong use.

Example:
  python cmres.py serve
  python cmres.py add lab demo +10s +1h --vms 3 --flavor m1.small --image cirros
  python cmres.py list
'''

FORMATS = ('table', 'json', 'jsonl', 'csv', 'yaml')
#: Other names that people give to options, and of which commands.
ALSO = {'--from': ([], '--start'), '--to': ([], '--end'), '--by': (['report'], '--by-whom'),
        '--aggregate': (['resource', 'sync'], '--aggregates'),
        '--for': (['token'], '--lasts'), '--name': (['token'], '--purpose')}

#: What a table shows of answers that have more fields than a line has room for.
COLUMNS = {'list': 'id label user project resource host vms flavor start end repeat state change '
                   'fault',
           'delete': 'id label user project resource vms start end state ends_with warnings',
           'calendar_list': 'id kind user project shows added polled fault held',
           'hit': 'label user project vms start end outcome',
           'resource_sync': 'resource what before after',
           'servers': 'n name state addresses planned begun ready deleted snapshot fault',
           'resource_list': 'name cell cloud region aggregate vms vcpus ram classes mode',
           'refused': 'line label error',
           'occurrences': 'uid start end status vms resource state outcome why',
           'events': 'uid summary label outcome start vms flavor count why'}
MOST_SHOWN = 40  # lines of a table within an answer
#: What a table that is too wide for its terminal goes without, the first first.
LEAST = ('id cloud project request vcpus ram image host flavor cell region aggregate kind warnings '
         'user repeat resource fault change vms').split()
#: Options that every command takes, and those of them that have no value.
COMMON = ('--config', '--format', '--tz', '--columns', '--sort')
SWITCHES = ('--wide', '--watch')
#: Seconds that a thread computes before another one may: who asks the store forty things in a
#: request waits that long each time while others compute, and Python's own 5 ms add up.
NIMBLE = 0.0003


def serve(config: Config, host: Name = '', port: int = None, noscheduler: bool = False,
          demo: bool = False) -> None:
    """Serves REST, and unless --noscheduler runs the life cycle too, until it is stopped.

    Where there never was a database, one is made. In a folder without database, key and
    configuration, and with --demo, it gets the resource `demo` and a token for an admin, which is
    shown once.

    Example:
      python cmres.py serve --port 8080
    """
    in_utc(config)
    sys.setswitchinterval(NIMBLE)
    config.take(host=host or config.host, port=config.port if port is None else port)
    told = prepared(config)
    if not os.path.exists(config.database):
        told = [told_made(config)]
    demo = demo or not (config.path or any(map(os.path.exists, (
        config.database, key_file(config.database, config.key)))))
    service = local_service(config, make=True)
    cycle = LifeCycle(config, service.clouds)
    service.wake, service.age = cycle.wake.set, None if noscheduler else cycle.age
    acts = None if noscheduler else cycle
    front = listening(Gate(web(service), service, acts), config)
    url = f'http://{config.host}:{config.port}'
    told += welcome(service, url) if demo else []
    print(f'cmres {__version__} serves {url} from {config.database}', *told, sep='\n', flush=True)
    note_start(service, 'serve')
    with running(acts, Housekeeper(service, acts, front), front.leave):
        front.run()


def listening(app: Callable, config: Config) -> Front:
    """The sockets of a server; the setting `port` is the one that it has then."""
    try:
        front = Front(app, config)
    except (OSError, ValueError) as error:
        raise Unavailable(f"can't listen on {config.host}:{config.port}: {error}; choose another "
                          'with --port') from None
    config.take(port=front.port)
    return front


def scheduler(config: Config, port: int = None) -> None:
    """Runs the life cycle alone, until it is stopped: boots what begins, deletes what is over.

    With --port it also answers `/metrics`, `/healthz` and `/readyz` there: calls to clouds are
    counted by the process that makes them.

    Example:
      python cmres.py scheduler --port 8081
    """
    in_utc(config)
    told = prepared(config)
    service = local_service(config)
    cycle = LifeCycle(config, service.clouds)
    service.wake, service.age, front = cycle.wake.set, cycle.age, None
    if port is not None:
        config.take(port=port)
        front = listening(Gate(health_of(service), service, cycle), config)
        told = [f'metrics are at http://{config.host}:{config.port}{METRICS_PATH}', *told]
    first = f'cmres {__version__} runs the life cycle of {config.database}'
    print(first, *told, sep='\n', flush=True)
    note_start(service, 'scheduler')
    with running(cycle, Housekeeper(service, cycle, front), front and front.leave) as stop:
        front.run() if front else stop.wait()


def tick(config: Config) -> None:
    """Makes one pass of the life cycle: for a line of cron such as `* * * * *`.

    Begins what is due, waits for the clouds' answers and records them. Does nothing while another
    scheduler acts.

    Example:
      python cmres.py tick
    """
    for line in prepared(config):
        print(line, file=sys.stderr)
    service = local_service(config)
    LifeCycle(config, service.clouds).settle()


def store_backup(config: Config, path: Name) -> dict:
    """Writes a copy of the database to a new file, as it is at one instant, also while cmres works.

    The key is not in the copy: whoever has the copy can't sign in. A restored copy gets along with
    a new key; then people sign in to the page anew.

    Example:
      python cmres.py store backup cmres-monday.db
    """
    refuse_missing(config.database)
    copy_store(config.database, path)
    return {'file': path, 'bytes': os.path.getsize(path), 'key': 'not in the copy'}


def store_verify(config: Config, path: Name = '') -> dict:
    """Reads all of the database, or of a copy of it, and tells whether it is whole.

    Exit code 1 if it is damaged. /readyz of `serve` tells what was found last.

    Example:
      python cmres.py store verify cmres-monday.db
    """
    return verify_store(path or config.database)


def store_restore(config: Config, path: Name) -> dict:
    """Puts a copy in the place of the database, once `serve` and all other commands are stopped.

    What was there is kept beside it. VMs started since the copy was written are not deleted until
    an admin says `store orphans --delete` or `--adopt`.

    Example:
      python cmres.py store restore cmres-monday.db
    """
    return restore_store(config.database, path, config.key)


def store_migrate(config: Config) -> dict:
    """Brings the database of an older cmres up to this one, once all its processes are stopped.

    A copy is made beside it first. `serve`, `scheduler` and `tick` do the same when they start.

    Example:
      python cmres.py store migrate
    """
    refuse_missing(config.database)
    done = migrate_store(config.database)
    open_store(config.database, config.key)
    return done or {'database': config.database, 'version': latest_version(),
                    'result': 'nothing to do'}


def key_rotate(config: Config) -> dict:
    """Makes a new key for cookies; who has signed in by the one before stays so to the end of that.

    Running processes take it at once. After a theft, say `user end` or stop cmres and take the
    file away: then everybody signs in anew.

    Example:
      python cmres.py key rotate
    """
    refuse_missing(config.database)
    file, until = key_file(config.database, config.key), int(time.time() + config.signed_in)
    return {'file': file, 'keys': rotate_key(file, until), 'old_until': instant(until)}


def config_show(config: Config) -> Rows:
    """Lists all settings as they are in force, where each comes from, and which need a restart.

    Secrets are not shown. `serve` and `scheduler` read the others again at SIGHUP.

    Example:
      python cmres.py config show
    """
    return [{'setting': name, 'value': shown_setting(config, name),
             'from': config.sources.get(name, 'default'),
             'change': 'restart' if name in NEEDS_RESTART else 'SIGHUP'} for name in SETTINGS]


def config_check(config: Config) -> dict:
    """Tells whether the settings are in order; exit code 2 if not. Nothing is made or changed.

    Example:
      python cmres.py config check --config /etc/cmres.ini
    """
    faults = [fault for check in CHECKS if (fault := check(config))]
    if faults:
        raise Invalid('; '.join(faults))
    return {'file': config.path or 'none', 'set': len(config.sources), 'result': 'ok'}


def fault_of_folder(config: Config) -> str:
    folder = os.path.dirname(os.path.abspath(config.database))
    fine = os.access(folder, os.W_OK | os.X_OK)
    return '' if fine else f"database: can't write to its folder '{folder}'"


def fault_of_key(config: Config) -> str:
    file = key_file(config.database, config.key)
    try:
        if os.path.exists(file):
            read_key(file)
    except Unavailable as error:
        return f'key: {error}'
    return ''


def fault_of_addresses(config: Config) -> str:
    """A setting that is an address and isn't."""
    wrong = [f"{name}: '{text}' is not an http(s) address" for name in ('url', 'address', 'webhook')
             if (text := getattr(config, name)) and not re.fullmatch(WEB, text)]
    port = config.mail_server.partition(':')[2]
    if port and not port.isdecimal():
        wrong.append(f"mail_server: '{config.mail_server}' is not HOST:PORT")
    return '; '.join(wrong)


def fault_of_credentials(config: Config) -> str:
    """An entry of clouds.yaml that is named and isn't there."""
    named = {each for each in config.credentials.values() if not each.startswith('simulated')}
    if not named:
        return ''
    from openstack.config import OpenStackConfig
    missing = sorted(named - {*OpenStackConfig().get_cloud_names()})
    return f"[credentials]: clouds.yaml has no {', '.join(missing)}" if missing else ''


CHECKS = (fault_of_folder, fault_of_key, fault_of_addresses, fault_of_credentials)


def event_export(config: Config, since: When = None) -> None:
    """Prints the whole event log, a line of JSON for each event, the oldest first.

    `events export` and `journal export` are the same.

    Example:
      python cmres.py event export --since 2027-01-01
    """
    service = Client(config.url, config.token) if config.url else local_service(config)
    asked = {'since': since or FIRST}
    while found := service.events(**asked, limit=EXPORTED):
        print(''.join(map(json_text, found)), end='', flush=True)
        asked = {'after': found[-1]['id']}


EXPORTED = 1000  # events that are read at once


def store_orphans(config: Config, delete: bool = False, adopt: bool = False) -> Rows:
    """Lists the VMs with the mark of cmres that the database does not know, as after a restore.

    After a restore they stay until an admin decides for all of them: with --delete the life cycle
    deletes them, with --adopt cmres leaves them to people for ever. `add --server ID` reserves one.

    Example:
      python cmres.py store orphans --adopt
    """
    if delete and adopt:
        raise Invalid('say either --delete or --adopt')
    service = local_service(config)
    found = all_orphans(LifeCycle(config, service.clouds))
    if delete or adopt:
        with service.writing() as now:
            left = adopted() | ({each['id'] for each in found} if adopt else set())
            note_fact('adopted', json.dumps(sorted(left)))
            run("DELETE FROM fact WHERE name = 'restored'")
            then = 'left to people' if adopt else 'deleted'
            service.journal(now, 'orphan', f'{len(found)} unknown VMs are {then}')
    return found


def all_orphans(cycle: LifeCycle) -> list[dict]:
    """The orphans on all clouds; CloudError if one does not answer."""
    found = []
    for account in sorted(cycle.clouds.accounts()):
        seen = {each.uid: each for each in cycle.clouds.open(account).servers()}
        found += [{'cloud': account, 'id': each.uid, 'state': each.state,
                   'added': instant(each.made), 'addresses': each.addresses}
                  for each in orphans_in(seen, cycle.matched(seen)) if each.uid not in adopted()]
    return found


def prepared(config: Config) -> list[str]:
    """Migrates an older database; what is to be said of that."""
    done = migrate_store(config.database)
    return [MIGRATED.format(**done)] if done else []


MIGRATED = "Migrated the database from version {before} to {after}; '{copy}' is a copy of before."
WORDS |= {'adopt': 'leave them to people for ever', 'delete': 'let the life cycle delete them',
          'demo': 'make the resource demo and a token, where there are none',
          'path': 'the name of the file that is the copy',
          'port': 'port to listen on; 0 takes a free one',
          'noscheduler': 'leave the life cycle to another process'}


def occurrences(config: Config, file: Ics, start: When = None, end: When = None,
                tz: Zone = '') -> Rows:
    """Tells when the events of an iCalendar file occur, in the next 366 days unless --start and
    --end say otherwise.

    Nothing is reserved. Times without a zone and whole days are in that of --tz. Events that can't
    be understood are not listed but named on the error output.

    Example:
      python cmres.py occurrences class.ics --start 2027-01-01 --end 2027-02-01 --tz Europe/Paris
    """
    start = (start if isinstance(start, datetime)
             else datetime.now(UTC).replace(microsecond=0) + (start or timedelta(0)))
    end = (start + (timedelta(days=366) if end is None else end) if not isinstance(end, datetime)
           else end)
    if not start < end:
        raise Invalid(f'the end {to_plain(end)} is not after the start {to_plain(start)}')
    zone = read_zone(tz or config.timezone)
    found, refused = occurrences_of(read_calendar(file, 'the file'), zone, start, end)
    if refused and not found:
        raise refused[0]
    for error in refused:
        print(f'cmres: not listed: {error}', file=sys.stderr)
    return found


def alerts(config: Config) -> None:
    """Prints ten alert rules for Prometheus, which scrapes /metrics as the job `cmres`.

    Example:
      python cmres.py alerts > /etc/prometheus/cmres.yml
    """
    import yaml
    print(yaml.safe_dump(alert_rules(), sort_keys=False, width=200), end='')


def dashboard(config: Config) -> None:
    """Prints a dashboard that Grafana imports.

    Example:
      python cmres.py dashboard > cmres.json
    """
    print(json_text(grafana_dashboard(), indent=2), end='')


def container(config: Config) -> None:
    """Prints a Containerfile: not root, nothing written but one volume, an end in good order.

    Example:
      python cmres.py container > Containerfile
    """
    print(CONTAINER.strip('\n'))


def completion(config: Config, shell: Name) -> None:
    """Prints what lets a shell complete commands, options, labels and names of resources.

    Example:
      python cmres.py completion bash >> ~/.bashrc
    """
    if shell not in COMPLETIONS:
        raise Invalid(f"there is no completion for '{shell}'{nearest(shell, COMPLETIONS)}; there "
                      f"is "
                      f"one for {', '.join(COMPLETIONS)}")
    print(COMPLETIONS[shell].strip('\n'))


#: Shells ask the program itself, with all words up to the one that is typed.
COMPLETIONS = {'bash': r"""
_cmres() {
    local IFS=$'\n'
    COMPREPLY=($(_CMRES_COMPLETE=1 cmres "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _cmres cmres
""", 'zsh': r"""
#compdef cmres
_cmres() {
    local -a found
    found=("${(@f)$(_CMRES_COMPLETE=1 cmres "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    (( $#found )) && [[ -n $found[1] ]] && compadd -Q -- $found || _files
}
compdef _cmres cmres
""", 'fish': r"""
complete -c cmres -f -a '(_CMRES_COMPLETE=1 cmres (commandline -opc)[2..-1] (commandline -ct))'
"""}


LOCAL = {each.__name__: Operation(each.__name__, each, ADMIN, [('POST', '', {})])
         for each in (serve, scheduler, tick, occurrences, store_backup, store_verify,
                      store_restore, store_migrate, store_orphans, completion, key_rotate,
                      config_show, config_check, event_export, alerts, dashboard, container)}


def in_utc(config: Config) -> None:
    """`schedule` reckons in local time, which stands still for an hour when summer ends."""
    os.environ['TZ'] = 'UTC'
    time.tzset()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(config.log_format))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    log_calls.disabled = not config.log_requests
    # it warns at every request that waits
    logging.getLogger('waitress.queue').setLevel(logging.ERROR)


@contextmanager
def running(cycle: LifeCycle | None, keeper: Housekeeper,
            leave: Callable[[], None] | None = None) -> Iterator[threading.Event]:
    """Runs a life cycle and a housekeeper beside what follows; signals end all in good order.

    Args:
      leave: what SIGTERM and Ctrl-C call; without it they end what follows at once
    """
    stop = threading.Event()

    def end(*_):
        stop.set()
        raise SystemExit(0)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, (lambda *_: leave()) if leave else end)
    signal.signal(signal.SIGHUP, lambda *_: keeper.read_again())
    watch = cycle and threading.Thread(target=keep_running, args=(cycle, stop), name='watch')
    try:
        keeper.start()
        if watch:
            watch.start()
        tell_systemd('READY=1')
        yield stop
    finally:
        stop.set()
        if watch:
            watch.join()
        store_file.settle()
        keeper.end()


def keep_running(cycle: LifeCycle, stop: threading.Event, every: float = 5) -> None:
    """Runs a life cycle in a thread until `stop` is set: begins another if it dies, and tells if it
    hangs.
    """
    import traceback
    thread, told = None, False
    while not stop.is_set():
        if not thread or not thread.is_alive():
            if thread:
                log.error('the life cycle has died; it begins anew')
            thread = threading.Thread(target=cycle.run, args=(stop,), daemon=True)
            thread.start()
        hangs = cycle.age() > LATE
        if hangs and not told:
            where = ''.join(traceback.format_stack(sys._current_frames().get(thread.ident)))
            log.error('the life cycle has made no pass for %.0f seconds; it is here:\n%s',
                      cycle.age(), where)
        told = hangs
        stop.wait(every)
    cycle.wake.set()
    thread.join(30)  # one that hangs is left behind


def local_service(config: Config, make: bool = False) -> Reservations:
    """The service on the local database; whoever can write that file acts as admin."""
    open_store(config.database, config.key, make)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = str(os.getuid())
    return Reservations(config, Clouds(config), Actor(user, 'default', ADMIN),
                        progress=progress_bar)


def told_made(config: Config) -> str:
    """That a database is made, as people read it."""
    file = key_file(config.database, config.key)
    return f"Made the database '{config.database}' and its key '{file}'."


def welcome(service: Reservations, url: str) -> list[str]:
    """Makes a resource and a token where there are none, and tells so."""
    lines = []
    if not service.resource_list():
        service.resource_add('demo', cloud='simulated', vms=16)
        lines.append("Made the resource 'demo': 16 vms on the built-in cloud 'simulated'.")
    if not service.token_list():
        token = service.token_add(service.actor.user, service.actor.project, ADMIN)['token']
        lines += [f'Made a token for {service.actor.user}, who is admin; it is shown only now: '
                  f'{token}',
                  f'Sign in with it: {url}/sign-in', 'Try:',
                  f"  curl -H 'Authorization: Bearer {token}' {url}{BASE}/resource/"]
    return lines


class Call:
    """A command that was understood but not made yet; it has no members that Fire could go on
    to.
    """

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
        return Call(operation, {name: value for name, value in typed.items()
                                if not isinstance(value, Untyped)})
    note.__signature__ = inspect.Signature([
        each.replace(annotation=REQUIRED, default=REQUIRED if helping and each.default is REQUIRED
                     else Untyped('' if each.default in (None, (), REQUIRED) else each.default))
        for each in operation.parameters.values()])
    words = ''.join(f'\n  {name}: {WORDS[name]}' for name in operation.parameters)
    note.__doc__ = inspect.getdoc(operation.method) + (f'\n\nArgs:{words}' if words else '')
    note.__name__, note._operation = operation.name, operation
    return note


def commands(leaf: Callable) -> Group:
    """The tree of all commands, those of the service and those of this machine; `leaf` makes one of
    an operation.
    """
    tree: dict = {}
    groups: dict = defaultdict(dict)
    for name, operation in (LOCAL | API).items():
        group, _, verb = name.partition('_')
        here, word = (groups[group], verb) if group in GROUPS else (tree, operation.words)
        here[word] = leaf(operation)
    return Group(HELP,
                 tree | {name: Group(GROUPS[name], members) for name, members in groups.items()})


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and tells its exit code."""
    options, zone = {}, UTC
    argv = list(sys.argv[1:] if argv is None else argv)
    if '_CMRES_COMPLETE' in os.environ:
        print('\n'.join(completed(argv)))
        return 0
    try:
        argv = take_options(argv, options)
        if argv == ['--version']:
            print(f'cmres {__version__}')
            return 0
        config = load_config(options.get('config'))
        config = dataclasses.replace(config, timezone=options.get('tz', config.timezone))
        zone = config.zone
        run_command(argv, lambda call: make(call, config, options) if isinstance(call, Call)
                    else call)
        return 0
    except Error as error:
        as_json = options.get('format') == 'json'
        said = (json_text(error_body(error), indent=2) if as_json
                else '\n'.join(in_words(error, zone)))
        print(legible(said).rstrip('\n'), file=sys.stderr)
        return 2 if isinstance(error, Invalid) else 1
    except STORE_ERRORS as error:
        if not (refusal := trouble(error)):
            raise
        print(f'cmres: {refusal}', file=sys.stderr)
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
        if name in COMMON or name == '--file' and rest[:1] == ['add']:
            value = value if equals else next(words, None)
            if not value:
                raise Invalid(f'{name} needs a value')
        if name in COMMON:
            options[name[2:]] = value
        elif word in SWITCHES:
            options[word[2:]] = True
        elif name in ALSO and rest[:len(ALSO[name][0])] == ALSO[name][0]:
            rest.append(ALSO[name][1] + equals + value)
        elif name == '--file' and rest[:1] == ['add']:
            rest = ['load', value, *rest[1:]]
        elif word == '--follow' and rest[:1] == ['events']:
            options['follow'] = True
        else:
            rest.append(word)
    if rest[:2] in (['events', 'export'], ['journal', 'export']):
        rest[:2] = ['event', 'export']
    if options.get('format', 'table') not in FORMATS:
        raise Invalid(f"--format: '{options['format']}' is none of {', '.join(FORMATS)}")
    return rest


def run_command(argv: list[str], finish: Callable) -> None:
    """Reads a line and prints what `finish` makes of the call that it is.

    Fire reads it and shows all help; a call that has nothing for Fire to find out is read without
    it, as to import it costs as much as to list reservations.
    """
    # Fire would take -h for a short --holidays.
    argv = ['--help' if word == '-h' else word for word in argv]
    if argv[:1] in ([], ['help']):
        argv = [*argv[1:], '--help']
    helping = '--help' in argv
    path, here = command_path(commands(lambda operation: operation), argv)
    if helping or isinstance(here, Group):
        show_help(path, helping)
    words = plain_flags(here, argv[len(path):])
    call = plain_call(here, words)
    if call is None:
        by_fire(path + words, finish)
    elif (text := finish(call)) is not None:
        print(text)


def show_help(path: list[str], helping: bool) -> None:
    """Prints Fire's help for a command or a group, and ends."""
    import fire
    from contextlib import redirect_stderr
    os.environ['PAGER'] = 'cat'
    tree = commands(functools.partial(command, helping=helping))
    with redirect_stderr(sys.stdout):
        fire.Fire(tree, path + ['--', '--help'], 'cmres')


def by_fire(words: list[str], finish: Callable) -> None:
    """Lets Fire read a whole line; its own flags, such as --interactive, are not ours to offer."""
    import fire
    fire.parser.DefaultParseValue = str  # else gpu#1, 1e3 and 2026 are guessed to be Python
    tree = commands(functools.partial(command, helping=False))
    # a lone `-` is a word of ours
    fire.Fire(tree, words + ['--', '--separator=\0'], 'cmres', finish)


def plain_call(operation: Operation, words: list[str]) -> Call | None:
    """The call of a line with nothing but words and flags with values, as Fire reads it; else
    None.
    """
    flags, plain, each = {}, [], iter(words)
    for word in each:
        name, equals, value = word[2:].partition('=')
        if not word.startswith('--'):
            plain.append(word)
            continue
        value = value if equals else next(each, '--')
        if not equals and value.startswith('-') or (name := name.replace('-', '_')) in flags:
            return None
        flags[name] = value
    rest = [name for name in operation.parameters if name not in flags]
    if len(plain) > len(rest):
        return None
    return Call(operation, dict(zip(rest, plain)) | flags)


#: What may stand for some arguments.
KNOWN_VALUES = {'state': STATES, 'role': ROLES, 'mode': (*MODES, 'open'), 'at_end': ENDS,
                'on_conflict': CLASHES,
           'then': THEN, 'format': FORMATS, 'shell': tuple(COMPLETIONS)}


def completed(words: list[str]) -> list[str]:
    """What the last of some words may become; nothing where that can't be told."""
    words = [word for word in words[:-1] if word != '='] + [words[-1].lstrip('=') if words else '']
    typed = words.pop()
    tree = commands(lambda operation: operation)
    with suppress(Error, OSError, *STORE_ERRORS):
        path, here = command_path(tree, [word for word in words if not word.startswith('-')])
        if isinstance(here, Group):
            return sorted(word for word in dir(here) if word.startswith(typed))
        name, equals, begun = typed.partition('=')
        if equals:
            return [f'{name}={each}' for each in values_of(here, name) if each.startswith(begun)]
        last = words[-1] if words else ''
        if last.startswith('--') and last not in SWITCHES and '=' not in last:
            return [each for each in values_of(here, last) if each.startswith(typed)]
        if typed.startswith('-'):
            flags = [f'--{each.replace("_", "-")}' for each in here.parameters]
            return [each for each in (*flags, *COMMON, *SWITCHES) if each.startswith(typed)]
        plain = [word for word in words[len(path):] if not word.startswith('--')]
        place = list(here.parameters)[len(plain):][:1]
        return [each for each in values_of(here, *place) if each.startswith(typed)]
    return []


def values_of(operation: Operation, name: str = '') -> list[str]:
    """What stands in the store for an argument, or may stand there."""
    name = name.removeprefix('--').replace('-', '_')
    if name in KNOWN_VALUES:
        return list(KNOWN_VALUES[name])
    config = load_config()
    service = Client(config.url, config.token) if config.url else local_service(config)
    if (name in ('resource', 'resources') or name == 'name'
        and operation.name.startswith('resource_')):
        return [each['name'] for each in service.resource_list()]
    if name == 'label' and operation.name != 'add':
        return list(dict.fromkeys(each['label'] for each in service.list(limit=1000)))
    return []


def command_path(tree: Group, argv: list[str]) -> tuple[list[str], Any]:
    """The words of a line that name its command, and that command; refuses an unknown one with the
    nearest.
    """
    path, here = [], tree
    for word in argv:
        if not isinstance(here, Group) or word == '--help':
            break
        if word not in dir(here):
            raise Invalid(f"there is no command "
                          f"'{' '.join([*path, word])}'{nearest(word, dir(here))}")
        path, here = [*path, word], getattr(here, word)
    return path, here


def joined_flags(operation: Operation, words: list[str]) -> list[str]:
    """The words after a command, those of a list that come under one flag again and again with
    commas between.
    """
    rest, lists, each = [], {}, iter(words)
    for word in each:
        flag, equals, value = word.partition('=')
        kind = (operation.parameters.get(flag[2:].replace('-', '_')) if flag.startswith('--')
                else None)
        if kind and kind.annotation in (Names, Parts, Hosts, Classes, Pairs):
            lists.setdefault(flag, []).append(value if equals else next(each, ''))
        else:
            rest.append(word)
    return rest + [f"{flag}={','.join(values)}" for flag, values in lists.items()]


def plain_flags(operation: Operation, words: list[str]) -> list[str]:
    """The words after a command, flags checked, and `--flag` of a yes-or-no argument closed by its
    value.
    """
    plain = []
    for word in joined_flags(operation, words):
        if re.match('-[A-Za-z]|--$', word):
            raise Invalid(f'{operation.words} has no option {shown(word)}; options begin with two '
                          'dashes, and what itself begins with a dash is written behind its name: '
                          '--label=-x')
        flag, equals, _ = word.partition('=')
        name = flag[2:].replace('-', '_')
        off = name.removeprefix('no')
        if (flag.startswith('--') and off in operation.parameters
            and name not in operation.parameters):
            name, word, equals = off, f'--{off}=false', '='
        if flag.startswith('--'):
            refuse_unknown(operation, [name])
            word += '=true' if not equals and operation.parameters[name].annotation is bool else ''
        plain.append(word)
    return plain


def make(call: Call, config: Config, options: dict) -> str | None:
    """Makes a call that Fire noted, here or on a server, and renders its answer."""
    operation = call._operation
    given = {name: from_file(value, operation.parameters[name].annotation)
             for name, value in call._given.items()}
    # the parts name resources: the rest came early
    if 'part' in given and 'end' not in given and 'resource' in given:
        given |= {'resource': ANY, 'start': given['resource']} | ({'end': given['start']}
                                                                  if 'start' in given else {})
    if 'tz' in operation.parameters:
        zone = options.get('tz') or (config.timezone if operation.routes[0][0] == 'POST' else '')
        given.setdefault('tz', zone)
    bound = bind(operation, given, Here(config.zone, instant(int(time.time()))))
    form = options.get('format', 'table')
    if operation.name in LOCAL:
        answer = operation.method(config, **bound)
        look = Look.of(options, COLUMNS.get(operation.name))
        return answer if answer is None else render(answer, form, config.zone, look)
    begins = operation.name in BEGINS and not bound.get('dry_run')
    if begins and not config.url and not os.path.exists(config.database):
        print(told_made(config), file=sys.stderr)
    service = (Client(config.url, config.token) if config.url
               else local_service(config, make=begins))
    asked = getattr(service, operation.name)
    if options.get('follow'):
        follow(asked, bound, form, config.zone)
    table = Look.of(options, None if operation.name == 'events' else COLUMNS.get(operation.name))
    while options.get('watch') and not operation.changes:
        shown = render(asked(**bound), form, config.zone, table)
        print(f'{CLEAR if sys.stdout.isatty() else ""}{shown}', flush=True)
        time.sleep(2)
    answer = asked(**bound)
    text = render(answer, form, config.zone, table)
    say_end(getattr(service, 'token_ends', ''), config.zone)
    if more := what_follows(operation, asked, bound, answer):
        say_more(more, form)
    if refused := nothing_taken(operation.name, answer):
        print(text)
        raise refused
    return text


def say_end(told: str, zone: ZoneInfo) -> None:
    """Tells on the error output that the token ends soon, as the server has said."""
    id, _, at = told.partition(' ')
    if at:
        print(f'Your token {id} ends at {format_time(parse_time(at, zone), zone)}. '
              f'Renew it: token renew {id} --for 90d', file=sys.stderr)


#: With these an operator begins, so that they make a database where there never was one.
BEGINS = ('resource_add', 'resource_sync', 'token_add')
CLEAR = '\x1b[H\x1b[2J'  # the cursor to its home, and the screen empty


def nothing_taken(name: str, answer) -> Error | None:
    """What a command that took nothing of many ends with."""
    if name == 'import_' and {each['outcome'] for each in answer['events']} == {'refused'}:
        return BadCalendar(f"all events that ask for VMs are refused: {len(answer['events'])}")
    if name == 'load' and answer.get('refused') and not answer.get('taken'):
        return Conflict(f"all reservations are refused: {len(answer['refused'])}")
    return None


def what_follows(operation: Operation, asked: Callable, bound: dict, answer) -> str:
    """Where a list goes on that is longer than what was shown; '' where it is whole."""
    limit = operation.parameters.get('limit')
    if not limit or 'after' not in operation.parameters or not isinstance(answer, list):
        return ''
    if not answer or len(answer) < bound.get('limit', limit.default) or 'id' not in answer[-1]:
        return ''
    last = answer[-1]
    after = last['id'] if operation.name == 'events' else cursor_of(last)
    shown = (last['id'] if operation.name == 'events'
             else f"{last['start']:%Y-%m-%dT%H:%M:%SZ}/{last['id']}")
    return f'--after {shown}' if asked(**bound | {'after': after, 'limit': 1}) else ''


def say_more(more: str, form: str) -> None:
    """Tells that a list goes on, where no program takes it for a line of the list."""
    print(f'There is more: add {more}, or a higher --limit.', file=sys.stderr)


def follow(events: Callable, bound: dict, form: str, zone: ZoneInfo, pause: float = 1) -> None:
    """Prints events as they come, a line each, until it is interrupted."""
    while True:
        for each in events(**bound):
            line = json_text(each) if form == 'json' else '  '.join(
                in_cell(each[name], zone)
                for name in ('at', 'actor', 'code', 'label', 'sentence')) + '\n'
            print(line, end='', flush=True)
            bound = bound | {'after': each['id']}
        time.sleep(pause)


def from_file(value: str, kind):
    """What a file argument stands for: the text of the file, or its reservations."""
    if (kind not in (File, Rows, Ics, Source) or not value or kind is Source
        and re.match('(https?|webcals?)://', value)):
        return value
    try:
        if kind in (Ics, Source):
            with open(value, 'rb') as file:  # what is not UTF-8 is for the guard to refuse
                return file.read(MOST_ICS + 4).decode('utf8', 'surrogateescape')
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
        kind = name.rpartition('.')[2].upper()
        raise Invalid(f"'{name}' can't be read as {kind}: {error}") from None
    except Exception as error:  # the YAML parser's own kinds, which are not worth importing it for
        raise Invalid(f"'{name}' is not YAML: {str(error).splitlines()[0]}") from None


#: What makes a formula of a cell in Excel and LibreOffice, the wide forms of East Asia too.
FORMULA = re.compile('[=+@\t\r\n\uff1d\uff0b\uff0d\uff20-]')


def unquoted(cell):
    """A cell as it was before `csv_cell` quoted it; what is too much in a line is a list."""
    quoted = isinstance(cell, str) and cell[:1] == "'" and FORMULA.match(cell[1:])
    return cell[1:] if quoted else cell


def csv_rows(text: str) -> list[dict]:
    """The lines of a CSV text with commas, or with semicolons as spreadsheets of many countries
    write them.
    """
    head = text.partition('\n')[0]
    reader = csv.DictReader(io.StringIO(text), restkey='', skipinitialspace=True,
                            delimiter=';' if ';' in head and ',' not in head else ',')
    lines = [{name: unquoted(cell) for name, cell in each.items()} | {'line': reader.line_num}
             for each in reader]
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


class Look(NamedTuple):
    """What of an answer a table shows."""
    columns: tuple[str, ...] | None = None  # without, all that are not empty
    chosen: bool = False                    # whether somebody asked for just these
    sort: str = ''
    width: int | None = None                # of a terminal; without, as wide as it needs to be

    @staticmethod
    def of(options: dict, usual: str | None = None) -> Look:
        """As the options of a command line say; `usual`: the columns that are shown without any."""
        chosen = [each.strip() for each in options.get('columns', '').split(',') if each.strip()]
        narrow = sys.stdout.isatty() and not options.get('wide')
        columns = chosen or (usual.split() if usual and not options.get('wide') else None)
        return Look(columns and tuple(columns), bool(chosen), options.get('sort', ''),
                    terminal_width() if narrow else None)


def render(answer, form: str, zone: ZoneInfo, look: Look = Look()) -> str:
    """An answer as text: a table for people, or JSON, CSV or YAML for programs."""
    if look.sort and isinstance(answer, list):
        answer = sorted_lines(answer, look.sort)
    if form == 'json':
        return json_text(answer, indent=2).rstrip('\n')
    if form == 'jsonl':
        lines = answer if isinstance(answer, list) else [answer]
        return ''.join(map(json_text, lines)).rstrip('\n')
    if form == 'yaml':
        return as_yaml(to_plain(answer))
    if form == 'csv':
        return as_csv(only_columns(answer if isinstance(answer, list) else [answer], look))
    return as_table(answer, zone, look)


def sorted_lines(lines: list[dict], names: str) -> list[dict]:
    """Lines by the fields that are named, with - before one whose last comes first; empty ones are
    last.
    """
    for name in reversed([each.strip() for each in names.split(',')]):
        field = name.removeprefix('-')
        refuse_unknown_column(field, lines)
        full = [each for each in lines if each.get(field) is not None]
        numbers = all(isinstance(each[field], (int, float, datetime)) for each in full)
        key = (lambda each: each[field]) if numbers else lambda each: str(each[field])
        lines = (sorted(full, key=key, reverse=name.startswith('-'))
                 + [each for each in lines if each.get(field) is None])
    return lines


def refuse_unknown_column(name: str, lines: list[dict]) -> None:
    known = list(dict.fromkeys(each for line in lines for each in line))
    if lines and name not in known:
        raise Invalid(f"there is no column '{name}'{nearest(name, known)}; "
                      f"there are {', '.join(known)}")


def only_columns(lines: list[dict], look: Look) -> list[dict]:
    """The lines with the columns that somebody chose."""
    if not look.chosen:
        return lines
    for name in look.columns:
        refuse_unknown_column(name, lines)
    return [{name: each.get(name) for name in look.columns} for each in lines]


def as_yaml(answer) -> str:
    import yaml
    text = yaml.safe_dump(answer, allow_unicode=True, sort_keys=False)
    if UNSEEN.search(text):  # the one way to escape some is to escape all that is not ASCII
        text = yaml.safe_dump(answer, sort_keys=False)
    return text.rstrip()


def as_csv(lines: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    for number, line in enumerate(lines):
        if number == 0:
            writer.writerow(line)
        writer.writerow(map(csv_cell, line.values()))
    return out.getvalue().rstrip('\n')


def csv_cell(value):
    """A value as a cell of a spreadsheet; a text that would be a formula there gets a quote."""
    if isinstance(value, str):
        return legible(f"'{value}" if FORMULA.match(value) else value)
    plain = to_plain(value)
    if not isinstance(plain, (list, dict)):
        return plain
    return legible(json.dumps(plain, ensure_ascii=False))


def as_table(answer, zone: ZoneInfo, look: Look = Look()) -> str:
    if isinstance(answer, dict):
        return as_pairs(answer, zone, look)
    if not answer:
        return 'nothing found'
    lines = only_columns(answer, look)
    names = list(dict.fromkeys(name for line in lines for name in line))
    if not look.chosen:
        filled = {name for name in names if any(line.get(name) not in EMPTY for line in lines)}
        names = [name for name in look.columns or names if name in filled] or names
    cells = [[in_cell(line.get(name), zone) for name in names] for line in lines]
    shown = range(len(names))
    if look.width and not look.chosen:
        shown = fitting(names, cells, look.width)
    text = drawn([names[each] for each in shown],
                 [[line[each] for each in shown] for line in cells])
    left_out = [name for name in names if names.index(name) not in shown]
    return text + (f"\nnot shown: {', '.join(left_out)} (--wide shows all)" if left_out else '')


EMPTY = (None, '', [], {}, ())


def as_pairs(answer: dict, zone: ZoneInfo, look: Look) -> str:
    """One thing: a line for each field that is not empty, then its lists as tables of their own."""
    if len(answer) == 1:
        return '\n'.join(in_cell(each, zone) for each in answer.values())
    inner = {name: each for name, each in answer.items()
             if each and isinstance(each, list) and isinstance(each[0], dict)}
    pairs = [(name, in_cell(each, zone)) for name, each in answer.items()
             if name not in inner and each is not False and each not in EMPTY]
    tables = [inner_table(name, each, zone, look) for name, each in inner.items()]
    return '\n'.join([drawn([], pairs) if pairs else '', *tables]).strip('\n')


def inner_table(name: str, lines: list[dict], zone: ZoneInfo, look: Look) -> str:
    columns = tuple(COLUMNS.get(name, COLUMNS['list']).split())
    text = as_table(lines[:MOST_SHOWN], zone, Look(columns, width=look.width))
    more = len(lines) - MOST_SHOWN
    return f'\n{name}:\n{text}' + (f'\n... and {more} more; --format json shows all' if more > 0
                                   else '')


def fitting(names: list[str], cells: list[list[str]], width: int) -> list[int]:
    """The columns for which a terminal has room: first goes what all lines share, then what matters
    least.
    """
    widths = [max(map(len, (name, *(line[place] for line in cells))))
              for place, name in enumerate(names)]
    shared = {name for place, name in enumerate(names)
              if len(cells) > 1 and len({line[place] for line in cells}) == 1}
    goes = [name for name in LEAST if name in shared] + [name for name in LEAST
                                                         if name not in shared]
    shown = list(range(len(names)))
    for name in goes:
        if sum(widths[each] + 2 for each in shown) - 2 <= width:
            break
        shown = [each for each in shown if names[each] != name]
    return shown


def drawn(names: list[str], lines: list) -> str:
    """A table as text, each column as wide as it needs to be; a terminal's widest ones are
    folded.
    """
    table = [names, *lines] if names else lines
    widths = [max(wide(part) for line in table for part in line[place].split('\n'))
              for place in range(len(table[0]))]
    on_terminal = sys.stdout.isatty()
    if on_terminal:
        times = [all(re.match(r'\d{4}-\d\d-\d\d \d\d:|-$', line[place]) for line in lines)
                 for place in range(len(widths))]
        widths = narrowed(widths, times, terminal_width())
    text = [drawn_line(line, widths) for line in table]
    if names and on_terminal:
        text[0] = f'\x1b[1m{text[0]}\x1b[0m'
    return '\n'.join(text)


def drawn_line(line: list[str], widths: list[int]) -> str:
    """A line of a table, of as many lines as its longest cell is folded into."""
    cells = [list(pieces_of(cell, width)) for cell, width in zip(line, widths)]
    return '\n'.join('  '.join(piece + ' ' * (width - wide(piece))
                               for piece, width in zip(pieces, widths)).rstrip()
                     for pieces in itertools.zip_longest(*cells, fillvalue=''))


def narrowed(widths: list[int], whole: list[bool], most: int, least: int = 12) -> list[int]:
    """Widths that fit a terminal: the widest goes down to the next, none that is `whole` or has the
    least.
    """
    widths = widths[:]
    while (too_many := sum(widths) + 2 * len(widths) - 2 - most) > 0:
        there = sorted({width for width, fixed in zip(widths, whole) if not fixed
                        and width > least})
        if not there:
            break
        place = next(n for n, width in enumerate(widths) if width == there[-1] and not whole[n])
        lower = there[-2] if len(there) > 1 else least
        widths[place] = max(widths[place] - too_many, lower if lower < there[-1] else least)
    return widths


def pieces_of(cell: str, width: int) -> Iterator[str]:
    """The lines of a cell, cut where they are too wide, between words if there are any."""
    for part in cell.split('\n'):
        while (end := fitting_end(part, width)) < len(part):
            space = part.rfind(' ', 1, end + 1)
            end = space if space > 0 and part[:space].strip() else end
            yield part[:end].rstrip()
            part = part[end:].lstrip()
        yield part


def fitting_end(text: str, width: int) -> int:
    """How many letters of a text fit; at least one."""
    taken = 0
    for end, letter in enumerate(text):
        taken += wide(letter)
        if taken > width:
            return max(end, 1)
    return len(text)


def wide(text: str) -> int:
    """How many columns of a terminal a text takes: letters of East Asia two, accents none."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width
    return sum(0 if combining(each) else 1 + (east_asian_width(each) in 'WF') for each in text)


def terminal_width() -> int:
    import shutil
    return shutil.get_terminal_size().columns


def in_words(error: Error, zone: ZoneInfo) -> list[str]:
    """What a person reads of an error: its sentence, and of its details what helps to go on."""
    details, lines = error.details, [f'cmres: {error}']
    for each in details.get('in_the_way', []):
        who = f"{each['label']} of {each['user']}, " if 'label' in each else ''
        what = f"{who}{each['vms']} vms" if 'vms' in each else each['reason']
        until = f"to {in_cell(each['end'], zone)}" if each['end'] else 'until they are deleted'
        lines.append(f"  in the way: {what} from {in_cell(each['start'], zone)} {until}")
    offers = {'next_start': 'the same from {}', 'most_vms': '{} vms at that time',
              'longest': '{} from that start'}
    lines += [f'  would fit:  {text.format(in_cell(details[name], zone))}'
              for name, text in offers.items() if name in details]
    lines += [f"  does not fit: {in_cell(each['start'], zone)}: {each['why']}"
              for each in details.get('conflicts', [])[1:MOST_SHOWN]]
    lines += [f"  line {each['line']}: {each['label']}: {each['error']}"
              for each in details.get('refused', [])]
    lines += [f"  {each['label']} of {each['user']}, {each['vms']} vms from "
              f"{in_cell(each['start'], zone)}"
              for each in details.get('occurrences', [])]
    return lines


if __name__ == '__main__':
    code = main()
    sys.stdout.flush()
    store_file.leave()
    # workers may wait for a cloud that hangs; what became of their calls, the next pass finds out
    os._exit(code)
