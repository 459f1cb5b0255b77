"""Asks judges which of two runs draws better: python -m dalle_jax.vote --make vote.html DIR DIR

Makes one page of two directories that sample has written, on which a judge compares their best
images caption by caption, not knowing whose they are; vote.key.json beside it knows. Then

    python -m dalle_jax.vote --count votes-*.json --key vote.key.json

counts what the judges have sent: majorities as in fig. 7 of Ramesh et al. 2021.
"""

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dalle_jax import plots, report, runs
from dalle_jax.evaluation import paper
from dalle_jax.runs import distinct_names, say, write_atomic
from dalle_jax.vote_count import (
    FAST, FEWEST, FULL, LOW, OUTCOMES, Key, count, read_key, read_votes)
from dalle_jax.vote_page import QUESTIONS, Comparison, content_hash, page

LARGE = 200 * 10**6  # bytes; phones, and mail, may refuse larger pages


def make(directories: Sequence[str | Path], out: str | Path, seed: int = 0, limit: int = 1000
         ) -> Key:
    """Writes the page `out`, and its key beside it.

    Args:
      directories: two, which `sample` has written for the same captions. Of each caption the image
        of rank 0 is shown, every pixel as it is.
      seed: determines which captions are compared, in which order, and the sides. Each run is on
        the left in half of the comparisons.
      limit: comparisons at most.

    Raises:
      ValueError: not two directories, no samples in one, other captions, an image that cannot be
        read, or the key of another page would be replaced. All before anything is written.
    """
    if len(directories) != 2 or Path(directories[0]).resolve() == Path(directories[1]).resolve():
        raise ValueError(f'directories to compare: {", ".join(map(str, directories)) or "none"}; '
                         'name two different ones that sample has written')
    if limit < 1:
        raise ValueError(f'--limit={limit}; give the number of comparisons, 1 or more')
    out = Path(out)
    if out.is_dir():
        raise ValueError(f'--make={out} is a directory; name the file the page is written to')
    first, second = _read_best(directories[0]), _read_best(directories[1])
    _check_captions(directories, [caption for caption, _ in first],
                    [caption for caption, _ in second])
    generator = random.Random(seed)
    chosen = generator.sample(range(len(first)), min(limit, len(first)))
    sides = [OUTCOMES[i % 2] for i in range(len(chosen))]
    generator.shuffle(sides)

    comparisons, entries = [], {}
    for number, (i, left) in enumerate(zip(chosen, sides), start=1):
        caption, files = first[i][0], (first[i][1], second[i][1])
        images = [_data_uri(file) for file in files]
        name = f'{number:04}'
        comparisons.append(Comparison(name, caption, *images[::1 if left == 'first' else -1]))
        entries[name] = {'caption': caption, 'left': left, 'files': list(map(str, files))}
    names = distinct_names([Path(os.path.abspath(path)) for path in directories])
    key = Key(content_hash(comparisons), tuple(names), entries)
    key_file = out.with_suffix('.key.json')
    if key_file.exists() and read_key(key_file).page != key.page:
        raise ValueError(f'{key_file} is the key of another page, whose votes could not be counted '
                         'without it; give another --make, or remove it')
    html = page(comparisons)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(key_file, json.dumps(key._asdict(), indent=2))
    report.write(out, html)
    say(f'wrote {out}, {len(comparisons)} comparisons, {plots.number(len(html) / 1e6)} MB; it goes '
        f'to the judges, and {key_file} stays here')
    if len(html) > LARGE:
        say(f'the page is larger than {LARGE / 1e6:.0f} MB, which may be too much for a phone; '
            '--limit makes it smaller')
    return key


def _read_best(directory):
    """(caption, file) of each caption's best image, in order."""
    listing, found = Path(directory) / 'samples.jsonl', []
    if not listing.exists():
        raise ValueError(f'{directory} has no samples.jsonl; name a directory that sample has '
                         'written')
    for number, text in enumerate(listing.read_text(encoding='utf-8').split('\n'), start=1):
        try:
            line = json.loads(text) if text else {'rank': None}
            if line['rank'] == 0:
                found.append((line['caption'], listing.parent / line['file']))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'{listing}: line {number} is damaged; if sample was stopped, run it '
                             'again') from error
    if not found:
        raise ValueError(f'{listing} lists no images; run sample again')
    return found


def _check_captions(directories, first, second):
    for number, (a, b) in enumerate(zip(first, second)):
        if a != b:
            raise ValueError(f'caption {number} is {a!r} in {directories[0]} and {b!r} in '
                             f'{directories[1]}; sample both with the same captions')
    if len(first) != len(second):
        shared = min(len(first), len(second))
        caption, where = ((first, directories[0]) if len(first) > shared else
                          (second, directories[1]))
        raise ValueError(f'caption {shared}, {caption[shared]!r}, is in {where} alone; '
                         'sample both with the same captions, to the end')


def _data_uri(file):
    """A PNG of the pixels, without what else the file may say of where it comes from."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return plots.data_uri(Image.fromarray(np.asarray(image.convert('RGB'))))
    except OSError as error:
        raise ValueError(f'{file} cannot be read as an image: {error}') from error


def tell(files: Sequence[str | Path], key: str | Path, exclude: Sequence[str], out: str | Path
         ) -> dict[str, Any]:
    """Counts votes, prints the shares, and writes the report `out` and beside it the .json.

    Raises:
      ValueError: see vote_count.read_key, read_votes and count; or a file that is read would be
        replaced. All before anything is written.
    """
    out = Path(out)
    if out.with_suffix('.key.json').exists():
        raise ValueError(f'--out={out} is the page of the judges; give another file')
    values, given = out.with_suffix('.json'), [Path(file).resolve() for file in (*files, key)]
    if out.suffix != '.html' or values.resolve() in given:
        raise ValueError(f'--out={out}: give the name of a new .html file; {values} is written, '
                         'too')
    known = read_key(key)
    result = count(read_votes(files, known), known, exclude)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(values, json.dumps(result, indent=1))
    report.write(out, votes_page(result))
    for question, (words, _) in QUESTIONS.items():
        say(f'{words}\n{_aligned([_header(result, question), *_rows(result, question)])}\n'
            f'{_reference(question)}\n')
    say(f'{_aligned([NUMBERS, *_numbers(result)])}\n')
    say(f'{_aligned([JUDGES, *_judges(result)])}\n')
    for text in _alarms(result):
        say(text)
    say(f'wrote {out} and {values}')
    return result


# -- the report ---------------------------------------------------------------------------------

JUDGES = ('judge', 'votes', 'median, s', f'below {FAST:g} s', 'agreement with the others',
          'of votes', '')
NUMBERS = ('comparisons with', *(f'{n} votes' if n != 1 else '1 vote' for n in range(FULL)),
           f'{FULL} or more')
BETTER = {'realism': 'more realistic', 'caption': 'matches the caption better'}


def votes_page(result: Mapping[str, Any]) -> str:
    """The report on what `vote_count.count` returns."""
    first, second = result['runs']
    judges = result['judges']
    left_out = f', without {", ".join(result["excluded"])}' if result['excluded'] else ''
    facts = {}
    for question in QUESTIONS:
        found = result['questions'][question]['all']
        for i, name in enumerate((first, second)):
            facts[f'{name}: {BETTER[question]}'] = report.Fact(
                _percent(found['shares'][OUTCOMES[i]]) or 'no votes',
                '95 % interval: ' * bool(found['comparisons'])
                + (_interval(found['intervals'][OUTCOMES[i]]) or ''))
    blocks = [report.facts(facts), *(report.note(text, alarm=True) for text in _alarms(result))]
    for question, (words, _) in QUESTIONS.items():
        blocks.append(report.section(
            words, 'Comparisons by the answer that more than half of their judges gave, with the '
            '95 % interval of the share (Wilson), and the single votes.',
            report.table(_rows(result, question), _header(result, question)),
            report.note(_reference(question))))
    blocks += [
        report.section('Votes of a comparison', 'How many comparisons have how many votes.',
                       report.table(_numbers(result), NUMBERS)),
        report.section('Judges', 'Agreement: of the votes on which the other judges who count '
                       'have a majority, the share that are the same. Low: its 95 % interval ends '
                       f'more than {100 * LOW:g} points below the median of the other judges, '
                       f'on {FEWEST} votes or more. '
                       f'Fast: a median below {FAST:g} s.',
                       report.table(_judges(result), JUDGES))]
    return report.page(
        f'{first} against {second}', f'{len(result["comparisons"]):,} captions, '
        f'judges: {len(judges) - len(result["excluded"])}{left_out}; page {result["page"]}', blocks)


def _header(result, question):
    found = result['questions'][question]
    header = ['', f'of {found["all"]["comparisons"]:,} comparisons', '95 % interval']
    if _partly_full(found):
        header += [f'of {found["full"]["comparisons"]:,} with {FULL} votes or more',
                   '95 % interval']
    return [*header, f'of {sum(found["votes"].values()):,} votes']


def _rows(result, question):
    """A row for each run, for `neither` and for comparisons without a majority."""
    found, rows = result['questions'][question], []
    names = dict(zip(OUTCOMES, (*result['runs'], 'neither is better')), none='no majority')
    for answer in found['all']['majorities']:
        row = [names[answer]]
        for part in ['all'] + ['full'] * _partly_full(found):
            row += [_counted(found[part]['shares'][answer], found[part]['majorities'][answer]),
                    _interval(found[part]['intervals'][answer])]
        rows.append([*row, _counted(found['vote_shares'].get(answer), found['votes'].get(answer))])
    return rows


def _numbers(result):
    rows = []
    for question, (words, _) in QUESTIONS.items():
        of_votes = {int(n): times
                    for n, times in result['questions'][question]['comparisons_by_votes'].items()}
        numbers = [*(of_votes.get(n, 0) for n in range(FULL)),
                   sum(times for n, times in of_votes.items() if n >= FULL)]
        rows.append([words, *(f'{times:,}' for times in numbers)])
    return rows


def _partly_full(found):
    """Whether some of the comparisons with votes, and not all, have as many as in the paper."""
    return 0 < found['full']['comparisons'] < found['all']['comparisons']


def _judges(result):
    rows = []
    for name, facts in result['judges'].items():
        remarks = ['left out'] * facts['excluded'] + ['low'] * facts['low'] + (
            ['fast'] * facts['fast'])
        rows.append([name, f'{facts["votes"]:,}', f'{facts["median_seconds"]:.1f}',
                     _percent(facts['fast_share']), _percent(facts['agreement']),
                     f'{facts["compared"]:,}', ', '.join(remarks)])
    return rows


def _alarms(result):
    """Sentences on judges whose votes may not be meant."""
    return [f'{name} agrees with the others in {_percent(facts["agreement"])} of the votes, less '
            f'than the other judges, at a median of {facts["median_seconds"]:.1f} s. The paper '
            f'left out a judge like this one; --exclude does so.'
            for name, facts in result['judges'].items()
            if facts['low'] and facts['fast'] and not facts['excluded']]


def _reference(question):
    first, second = paper.HUMAN[question]
    return (f'For reference, from another experiment (fig. 7 of Ramesh et al. 2021: captions of '
            f'MS-COCO, best of five votes): DALL-E {first:.1f} %, DF-GAN {second:.1f} %.')


def _percent(share):
    return None if share is None else f'{100 * share:.1f} %'


def _counted(share, times):
    return None if share is None else f'{100 * share:.1f} % ({times:,})'


def _interval(interval):
    return interval and f'{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %'


def _aligned(rows):
    """Rows as lines for a console; columns after the first align right."""
    cells = [['' if value is None else value for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return '\n'.join('  '.join(
        text.rjust(width) if i else text.ljust(width)
        for i, (text, width) in enumerate(zip(row, widths))).rstrip() for row in cells)


def main(argv):
    if bool(FLAGS.make) == bool(FLAGS.count):
        raise ValueError('give --make, to make a page of two directories, or --count, to count '
                         'votes')
    if FLAGS.make:
        make(argv[1:], FLAGS.make, FLAGS.seed, FLAGS.limit)
    elif not FLAGS.key:
        raise ValueError('--count needs --key, the file that --make wrote beside the page')
    else:
        tell([FLAGS.count, *argv[1:]], FLAGS.key, FLAGS.exclude, FLAGS.out)


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('make', '', 'HTML file for the judges, of two directories given as '
                        'arguments.')
    flags.DEFINE_integer('seed', 0, 'Which captions, their order, and the sides.')
    flags.DEFINE_integer('limit', 1000, 'Comparisons of the page at most.')
    flags.DEFINE_string('count', '', 'File of votes; further ones are given as arguments.')
    flags.DEFINE_string('key', '', 'The .key.json that --make wrote.')
    flags.DEFINE_multi_string('exclude', [], 'A judge whose votes do not count; may be repeated.')
    flags.DEFINE_string('out', 'votes.html', 'The report; its numbers are written beside it as '
                        '.json.')
    runs.start(main)
