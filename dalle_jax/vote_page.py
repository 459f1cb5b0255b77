"""The page on which a judge compares the images of two runs, caption by caption.

One file that works offline, from a disk or a server: its policy allows the script and the style in
it, by their hashes, and images in data: URIs, and forbids the network. It knows neither the names
of the runs nor which image is whose. Every answer is kept in the browser's localStorage under the
page's hash and the judge's name, and in the file that the judge downloads:

    {"page": hash, "judge": name, "votes": [
        {"id": "0001", "question": "realism", "answer": "left", "seconds": 5.2}, ...]}
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Question -> its words and its answers.
QUESTIONS = {
    'realism': ('Which image is more realistic?', ('left', 'right')),
    'caption': ('Which image better matches the caption?', ('left', 'right', 'neither')),
}


class Comparison(NamedTuple):
    """What a judge sees; the images are data: URIs."""

    id: str
    caption: str
    left: str
    right: str


def content_hash(comparisons: Iterable[Comparison]) -> str:
    """16 hexadecimal digits of all that is compared, in its order, on its sides."""
    digest = hashlib.sha256()
    for comparison in comparisons:
        digest.update(json.dumps(comparison).encode())
    return digest.hexdigest()[:16]


def page(comparisons: Sequence[Comparison]) -> str:
    """The document; ASCII."""
    # One element a comparison, read when it is shown: browsers limit the length of a string.
    pairs = ''.join(
        f'<script type="application/json" class="pair" data-id="{comparison.id}">'
        + json.dumps(comparison._asdict()).replace('<', '\\u003c') + '</script>\n'
        for comparison in comparisons)
    questions = {name: {'words': words, 'answers': answers}
                 for name, (words, answers) in QUESTIONS.items()}
    script = SCRIPT.replace('QUESTIONS', json.dumps(questions))
    policy = (f"default-src 'none'; img-src data:; style-src '{_allowed(STYLE)}'; "
              f"script-src '{_allowed(script)}'; base-uri 'none'; form-action 'none'")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<title>Two images for a caption</title><style>{STYLE}</style></head>\n'
        f'<body data-page="{content_hash(comparisons)}">{BODY}\n{pairs}'
        f'<script>{script}</script></body></html>\n')


def _allowed(text):
    """How a policy names an inline script or style."""
    return 'sha256-' + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #191b1f; --soft: #5f666f;
  --line: #d9d9d5; --wash: #f3f3f0; --main: #2062b8; --on: #fff; --bad: #b3261e; --alarm: #fcefed }
@media (prefers-color-scheme: dark) { :root { --paper: #141517; --ink: #e8e8e5; --soft: #a1a7af;
  --line: #3a3d42; --wash: #1f2125; --main: #7ab0fb; --on: #10151c; --bad: #ff8f86;
  --alarm: #35201f } }
* { box-sizing: border-box; -webkit-text-size-adjust: 100% } [hidden] { display: none !important }
body { margin: 0 auto; max-width: 1080px; padding: 20px 24px; background: var(--paper);
  color: var(--ink); overflow-wrap: anywhere; font: 1rem/1.5 system-ui, -apple-system, 'Segoe UI',
  Roboto, 'Helvetica Neue', Arial, sans-serif }
h1, h2, p, figure { margin: 0 } h1, h2 { font-weight: 620; line-height: 1.25 }
h1 { font-size: clamp(1.5rem, 5vw, 2rem); letter-spacing: -.015em } h2 { font-size: 1.25rem }
:focus-visible { outline: 3px solid var(--main); outline-offset: 2px }
h1:focus, h2:focus { outline: none }
.words { max-width: 62ch; margin: 6vh auto 0; display: grid; gap: 18px }
.soft, figcaption, .bar { color: var(--soft); font-size: .875rem }
.alarm { padding: 10px 16px; margin-bottom: 16px; border-left: 3px solid var(--bad);
  background: var(--alarm) }
form { display: grid; gap: 8px } label { font-weight: 550 }
textarea { width: 100%; font-size: .75rem }
input { font: inherit; padding: 10px 12px; border: 1px solid var(--soft); border-radius: 8px;
  background: var(--paper); color: inherit; width: 100% }
button { font: inherit; min-height: 48px; padding: 8px 18px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--wash); color: inherit; cursor: pointer;
  touch-action: manipulation }
button:hover { border-color: var(--main) } button:disabled { opacity: .45; cursor: default }
.main { background: var(--main); border-color: var(--main); color: var(--on); font-weight: 600 }
.line { display: flex; gap: 12px; flex-wrap: wrap }
.bar { display: flex; gap: 14px; align-items: center; font-variant-numeric: tabular-nums }
progress { flex: 1; min-width: 60px; height: 8px; accent-color: var(--main) }
#text { font-size: clamp(1.125rem, 2.6vw, 1.5rem); line-height: 1.35; margin: 16px auto 14px;
  text-align: center; max-width: 60ch; font-weight: 550; color: var(--soft) }
#text.asked { color: inherit }
.images { display: grid; grid-template-columns: 1fr 1fr; gap: clamp(8px, 2vw, 24px);
  max-width: max(424px, 200vh - 776px); margin: 0 auto }
figure { display: grid; justify-items: center; gap: 4px; align-content: start }
img { display: block; width: 100%; height: auto; border-radius: 4px;
  outline: 1px solid var(--line) }
#question { text-align: center; margin: 14px 0 12px }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; max-width: 760px;
  margin: 0 auto } .answers.three { grid-template-columns: 1fr 1fr 1fr }
.answers button { min-height: 56px; font-weight: 600; padding: 8px } kbd { font: inherit;
  font-weight: 400; color: var(--soft); margin: 0 .25em } .foot { margin-top: 22px;
  justify-content: center; border-top: 1px solid var(--line); padding-top: 14px }
.foot button { min-height: 44px; font-size: .875rem }
@media (pointer: coarse) { kbd, .keys { display: none } }
@media (max-width: 560px) { body { padding: 14px 12px } .answers { gap: 8px }
  kbd, .keys { display: none } }
"""

BODY = """
<p class="alarm" id="alarm" role="alert" hidden></p>
<main>
<section class="words" id="start">
<h1>Which of two images is better?</h1>
<p>You will see <b class="count"></b>, each with two images. For each you are asked which image is
more realistic, and which one better matches the caption. Look at both, and answer as you see it.
</p>
<form id="form"><label for="name">Your name</label>
<input id="name" required maxlength="60" autocomplete="name" spellcheck="false">
<p class="soft" id="saved" aria-live="polite"></p>
<button class="main" id="begin">Begin</button></form>
<p class="soft">Every answer is kept in this browser at once: you may close the page and go on
later. At the end you download a file with your answers and send it to whoever asked you. Nothing
is sent by this page. <span class="keys">Keys: left and right arrow answer, arrow down is
&ldquo;neither&rdquo;, backspace takes the last answer back.</span></p>
</section>
<section id="compare" hidden>
<div class="bar"><label for="done" id="where"></label><progress id="done"></progress></div>
<p id="text" dir="auto"></p>
<div class="images"><figure><img id="left" alt="Left image"><figcaption>Left</figcaption></figure>
<figure><img id="right" alt="Right image"><figcaption>Right</figcaption></figure></div>
<h2 id="question" tabindex="-1" aria-live="polite"></h2>
<div class="answers" id="answers">
<button data-answer="left"><kbd>&larr;</kbd> Left</button>
<button data-answer="neither">Neither is better <kbd>&darr;</kbd></button>
<button data-answer="right">Right <kbd>&rarr;</kbd></button></div>
<div class="line foot"><button class="back">Back <kbd>&#9003;</kbd></button>
<button class="download">Download answers so far</button></div>
</section>
<section class="words" id="end" hidden>
<h1 id="thanks" tabindex="-1"></h1>
<p>You have judged all of <b class="count"></b>. Download the file with your answers, and send it to
whoever asked you.</p>
<div class="line"><button class="main download">Download answers</button>
<button class="back">Back to the last question</button></div>
<details class="soft"><summary>No file comes?</summary><p>Some browsers within other apps cannot
download. Copy this text, and send it in place of the file.</p>
<textarea id="copy" rows="5" readonly aria-label="Your answers"></textarea></details>
</section>
</main>"""

SCRIPT = """
'use strict';
const questions = Object.entries(QUESTIONS);
const soonest = 0.3;  // seconds; a faster answer is what is left of a double click
const $ = id => document.getElementById(id);
const each = (selector, act) => document.querySelectorAll(selector).forEach(act);
const pairs = [...document.querySelectorAll('script.pair')];
const page = document.body.dataset.page;
// The n-th vote answers question n % 2 of comparison n / 2, so the votes are all there is to keep.
let judge = '', votes = [], earlier = {}, since = 0;

const place = name => `dalle_jax vote ${page} ${name}`;
const record = () => ({page, judge, votes});
const named = () => $('name').value.normalize('NFC').trim().replace(/\\s+/g, ' ');

function kept(attempt) {
  try {
    return attempt();
  } catch (error) {
    $('alarm').textContent = 'This browser does not keep your answers (' + error.message +
      '). Download them before you close or reload the page.';
    $('alarm').hidden = false;
    window.onbeforeunload = event => {
      event.preventDefault();
      event.returnValue = true;
    };
  }
}

function stored(name) {
  const found = kept(() => JSON.parse(localStorage.getItem(place(name))));
  return found ? found.votes : [];
}

function save() {
  kept(() => {
    localStorage.setItem(place(judge), JSON.stringify(record()));
    localStorage.setItem(place(''), JSON.stringify({judge, votes: []}));
  });
}

function greet() {
  const count = stored(named()).length, whole = Math.floor(count / questions.length);
  $('saved').textContent = named() && count ?
    `${whole} of ${pairs.length} are answered under this name.` : '';
  $('begin').textContent = named() && count ? 'Continue' : 'Begin';
}

function show() {
  const index = Math.floor(votes.length / questions.length), ended = index >= pairs.length;
  $('start').hidden = true;
  $('compare').hidden = ended;
  $('end').hidden = !ended;
  each('.back', button => { button.disabled = !votes.length; });
  if (ended) {
    $('thanks').textContent = `Thank you, ${judge}.`;
    $('copy').value = JSON.stringify(record(), null, 1);
    $('thanks').focus();
    return;
  }
  const {caption, left, right} = JSON.parse(pairs[index].textContent);
  const [name, {words, answers}] = questions[votes.length % questions.length];
  $('text').textContent = caption;
  $('text').classList.toggle('asked', name === 'caption');
  $('left').src = left;
  $('right').src = right;
  $('where').textContent = `${index + 1} of ${pairs.length}`;
  $('done').max = pairs.length * questions.length;
  $('done').value = votes.length;
  $('question').textContent = words;
  $('answers').classList.toggle('three', answers.length > 2);
  each('[data-answer]', button => { button.hidden = !answers.includes(button.dataset.answer); });
  $('question').focus({preventScroll: true});
  since = performance.now();
}

function answer(choice) {
  const spent = (performance.now() - since) / 1000, n = votes.length;
  const [question, {answers}] = questions[n % questions.length];
  if (spent < soonest || !answers.includes(choice)) return;
  const seconds = Math.round(1000 * (spent + (earlier[n] || 0))) / 1000;
  votes.push({id: pairs[Math.floor(n / questions.length)].dataset.id, question, answer: choice,
              seconds});
  save();
  show();
}

function back() {
  if (!votes.length) return;
  const {seconds} = votes.pop();
  earlier[votes.length] = seconds;  // thinking again adds to the time
  save();
  show();
}

function download() {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([JSON.stringify(record(), null, 1)],
                                           {type: 'application/json'}));
  link.download = `votes-${judge.replace(/[^\\p{L}\\p{N}._-]+/gu, '-')}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

each('.count', where => {
  where.textContent = pairs.length === 1 ? '1 caption' : `${pairs.length} captions`;
});
each('[data-answer]', button => { button.onclick = () => answer(button.dataset.answer); });
each('.back', button => { button.onclick = back; });
each('.download', button => { button.onclick = download; });
$('name').oninput = greet;
$('form').onsubmit = event => {
  event.preventDefault();
  judge = named();
  if (!judge) return;
  votes = stored(judge);
  show();
};
document.onkeydown = event => {
  const key = {ArrowLeft: 'left', ArrowRight: 'right', ArrowDown: 'neither', Backspace: 'back'};
  const meant = key[event.key];
  if (!meant || $('start').hidden === false || event.repeat || event.ctrlKey || event.metaKey ||
      event.altKey) return;
  if (meant === 'back') {
    event.preventDefault();
    back();
  } else if (!$('compare').hidden) {
    event.preventDefault();
    answer(meant);
  }
};
function refresh() {
  votes = stored(judge);
  show();
}

window.onstorage = event => {  // the same judge in another window
  if (judge && event.key === place(judge)) refresh();
};
window.onpageshow = event => {  // a page that comes back has slept through those events
  if (judge && event.persisted) refresh();
};
$('name').value = (kept(() => JSON.parse(localStorage.getItem(place('')))) || {judge: ''}).judge;
greet();
"""
