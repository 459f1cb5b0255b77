"""Judges' votes: read with everything checked, and counted as in Ramesh et al. 2021 (app. F).

Of each comparison and question the answer that more than half of the judges gave counts, the best
of five where there are five of them. Comparisons on which no answer has a majority, and those with
fewer votes, are counted as what they are.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.vote_page import QUESTIONS

FULL = 5  # votes of a comparison in the paper
FAST = 4.0  # seconds; the paper left out a judge with many answers below it, and high disagreement
LOW, FEWEST = 0.1, 10  # a judge is pointed out who agrees less by this, with as many votes or more
OUTCOMES = ('first', 'second', 'neither')  # whose image is better


class Key(NamedTuple):
    """Which image is whose: what `vote --make` wrote beside the page.

    Attributes:
      page: the page's hash.
      runs: two names.
      comparisons: id -> {'caption', 'left': 'first' or 'second', 'files': [of first, of second]}.
    """

    page: str
    runs: tuple[str, str]
    comparisons: dict[str, dict[str, Any]]


class Votes(NamedTuple):
    """A judge's answers: (id, question) -> (outcome, seconds)."""

    judge: str
    answers: dict[tuple[str, str], tuple[str, float]]


def read_key(path: str | Path) -> Key:
    """The key of a page.

    Raises:
      ValueError: it is none, or damaged.
    """
    try:
        values = json.loads(Path(path).read_text(encoding='utf-8'))
        key = Key(values['page'], tuple(values['runs']), values['comparisons'])
        good = len(key.runs) == 2 and all(
            entry['left'] in OUTCOMES[:2] and isinstance(entry['caption'], str)
            and len(entry['files']) == 2 for entry in key.comparisons.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{path} cannot be read as a key ({_told(error)}); give the .key.json '
                         'that --make wrote beside the page') from error
    if not good:
        raise ValueError(f'{path} is damaged; --make with the same runs and --seed writes it again')
    return key


def read_votes(paths: Sequence[str | Path], key: Key) -> list[Votes]:
    """The files that judges have downloaded, one a judge.

    Raises:
      ValueError: none is given, or one is damaged, without votes, of another page, or of a judge
        of whom there is another file.
    """
    if not paths:
        raise ValueError('no votes to count; give the files that the judges have downloaded')
    found, files = [], {}
    for path in paths:
        votes = _read_votes(path, key)
        if votes.judge in files:
            raise ValueError(f'{files[votes.judge]} and {path} are both of the judge '
                             f'{votes.judge!r}; give the later one alone, or, if they are two '
                             'people, change the name in one')
        files[votes.judge] = path
        found.append(votes)
    return found


def _read_votes(path, key):
    try:
        values = json.loads(Path(path).read_text(encoding='utf-8'))
        page, judge, lines = values['page'], values['judge'], values['votes']
        if not (isinstance(judge, str) and judge.strip() and isinstance(lines, list)):
            raise ValueError(f'judge is {judge!r}, votes are {type(lines).__name__}')
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{path} cannot be read as votes ({_told(error)}); ask the judge to '
                         'download them again') from error
    if page != key.page:
        raise ValueError(f'{path} holds votes on the page {page}, and the key is of {key.page}; '
                         'give the key beside the page that was judged')
    if not lines:
        raise ValueError(f'{path} holds no votes; leave it out')
    answers = {}
    for number, line in enumerate(lines, start=1):
        try:
            name, question, answer = line['id'], line['question'], line['answer']
            seconds = float(line['seconds'])
            known = name in key.comparisons, question in QUESTIONS
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f'{path}: vote {number} is damaged: {line!r}') from error
        if not all(known):
            raise ValueError(f'{path}: vote {number} is on {name!r}, {question!r}, which the page '
                             'does not have')
        if answer not in QUESTIONS[question][1] or not 0 <= seconds < math.inf:
            raise ValueError(f'{path}: vote {number} is damaged: {line!r}')
        if (name, question) in answers:
            raise ValueError(f'{path}: vote {number} is the second one on {name!r}, {question!r}')
        left = key.comparisons[name]['left']
        right = 'second' if left == 'first' else 'first'
        outcome = {'left': left, 'right': right, 'neither': 'neither'}[answer]
        answers[name, question] = outcome, seconds
    return Votes(judge, answers)


def _told(error):
    return f'{error} is missing' if isinstance(error, KeyError) else error


def majority(counts: Mapping[str, int]) -> str | None:
    """The answer that more than half of the votes are for; None if there is none."""
    return next((answer for answer, count in counts.items()
                 if 2 * count > sum(counts.values())), None)


def wilson(successes: int, trials: int) -> tuple[float, float] | None:
    """The 95 % score interval of a share (Wilson 1927); None without trials."""
    if not trials:
        return None
    z = 1.959963984540054  # the normal distribution's quantile at 0.975
    centre = (successes + z * z / 2) / (trials + z * z)
    half = z / (trials + z * z) * math.sqrt(
        successes * (trials - successes) / trials + z * z / 4)
    # At the ends rounding alone would leave [0, 1], or exclude the share itself.
    return (max(0.0, centre - half) if successes else 0.0,
            min(1.0, centre + half) if successes < trials else 1.0)


def count(votes: Sequence[Votes], key: Key, exclude: Collection[str] = ()) -> dict[str, Any]:
    """Outcomes of all comparisons, shares, and what is to be known of the judges.

    Args:
      exclude: judges whose votes do not count. Judges are told about all the same.

    Returns:
      What `vote --count` writes as JSON. questions: question -> all (comparisons with a vote) and
      full (with five or more), each with comparisons, majorities (outcome or 'none' -> number),
      shares and intervals (of all of these comparisons, 95 %); votes and vote_shares by outcome;
      comparisons_by_votes. judges: judge -> votes, median_seconds, fast_share (of the answers in
      less than 4 s), compared, agreement (share of the compared votes that are those of the
      majority of the other judges who count), excluded, low, fast. comparisons: id -> caption,
      files, and of each question the votes and the outcome.

    Raises:
      ValueError: `exclude` names an unknown judge, or nobody remains.
    """
    judges = [one.judge for one in votes]
    unknown = [name for name in exclude if name not in judges]
    if unknown:
        raise ValueError(f'--exclude={unknown[0]}: there is no such judge; there are '
                         f'{", ".join(judges)}')
    counted = [one for one in votes if one.judge not in exclude]
    if not counted:
        raise ValueError('--exclude leaves no judge; leave fewer out')
    tallies = {(name, question): dict.fromkeys(
        (outcome for outcome in OUTCOMES
         if outcome != 'neither' or 'neither' in QUESTIONS[question][1]), 0)
        for name in key.comparisons for question in QUESTIONS}
    for one in counted:
        for where, (outcome, _) in one.answers.items():
            tallies[where][outcome] += 1
    return {
        'page': key.page, 'runs': list(key.runs), 'excluded': sorted(set(exclude)),
        'questions': {question: _of_question([
            tallies[name, question] for name in key.comparisons]) for question in QUESTIONS},
        'judges': _of_judges(votes, tallies, exclude),
        'comparisons': {name: {
            'caption': entry['caption'], 'files': entry['files'],
            **{question: {'votes': tallies[name, question],
                          'outcome': majority(tallies[name, question])} for question in QUESTIONS}}
            for name, entry in key.comparisons.items()}}


def _of_question(tallies):
    total = {answer: sum(tally[answer] for tally in tallies) for answer in tallies[0]}
    votes = sum(total.values())
    by_votes = Counter(sum(tally.values()) for tally in tallies)
    return {'all': _majorities(tallies, 1), 'full': _majorities(tallies, FULL), 'votes': total,
            'vote_shares': {answer: n / votes if votes else None for answer, n in total.items()},
            'comparisons_by_votes': {str(n): by_votes[n] for n in sorted(by_votes)}}


def _majorities(tallies, least):
    """Of the comparisons with at least this many votes."""
    chosen = [tally for tally in tallies if sum(tally.values()) >= least]
    found = Counter(majority(tally) or 'none' for tally in chosen)
    numbers = {answer: found[answer] for answer in (*tallies[0], 'none')}
    return {'comparisons': len(chosen), 'majorities': numbers,
            'shares': {answer: n / len(chosen) if chosen else None
                       for answer, n in numbers.items()},
            'intervals': {answer: wilson(n, len(chosen)) for answer, n in numbers.items()}}


def _of_judges(votes, tallies, exclude):
    found = {}
    for one in votes:
        compared = agreed = 0
        for where, (outcome, _) in one.answers.items():
            others = tallies[where]
            if one.judge not in exclude:
                others = {**others, outcome: others[outcome] - 1}
            verdict = majority(others)
            compared += verdict is not None
            agreed += verdict == outcome
        seconds = [spent for _, spent in one.answers.values()]
        found[one.judge] = {
            'votes': len(seconds), 'median_seconds': float(np.median(seconds)),
            'fast_share': float(np.mean(np.array(seconds) < FAST)), 'compared': compared,
            'agreed': agreed, 'agreement': agreed / compared if compared else None,
            'excluded': one.judge in exclude}
    for judge, facts in found.items():
        others = [other['agreement'] for name, other in found.items()
                  if name != judge and not other['excluded'] and other['agreement'] is not None]
        interval = wilson(facts['agreed'], facts['compared'])
        # By more than chance explains.
        facts['low'] = bool(others and facts['compared'] >= FEWEST
                            and interval[1] < np.median(others) - LOW)
        facts['fast'] = facts['median_seconds'] < FAST
    return found
