"""A headless Chromium, driven over its pipe: real keys, clicks, reloads and downloads."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, (
    'chromium-headless-shell', 'chrome-headless-shell', 'chromium', 'google-chrome'))), None)
KEYS = {'ArrowLeft': 37, 'ArrowRight': 39, 'ArrowDown': 40, 'Backspace': 8, 'Enter': 13, 'Tab': 9}


class Browser:
    """One window. What the page writes to its console as an error is in `errors`."""

    def __init__(self, folder: Path, width: int = 1100, height: int = 850):
        """Downloads and the profile go to `folder`."""
        self.errors, self._count = [], 0
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4.
        self._process = subprocess.Popen(
            ['bash', '-c', f'exec "$@" 3<&{read} 4>&{write}', 'bash', CHROMIUM, '--headless',
             '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--disable-dev-shm-usage',
             '--remote-debugging-pipe',
             f'--user-data-dir={folder / "profile"}', 'about:blank'],
            pass_fds=(read, write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self._rest = b''
        self._session = None
        target = next(t for t in self._send('Target.getTargets')['targetInfos']
                      if t['type'] == 'page')['targetId']
        self._session = self._send('Target.attachToTarget', targetId=target, flatten=True)[
            'sessionId']
        for domain in ('Page', 'Runtime', 'Log'):
            self._send(f'{domain}.enable')
        self._send('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(folder))
        self.resize(width, height)

    def resize(self, width: int, height: int) -> None:
        self._send('Emulation.setDeviceMetricsOverride', width=width, height=height,
                   deviceScaleFactor=1, mobile=width < 600)

    def _send(self, method, **params):
        self._count += 1
        message = {'id': self._count, 'method': method, 'params': params}
        if self._session and not method.startswith(('Target', 'Browser')):
            message['sessionId'] = self._session
        os.write(self._write, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._receive()
            if answer.get('id') == self._count:
                assert 'error' not in answer, answer
                return answer['result']

    def _receive(self):
        while b'\0' not in self._rest:
            ready = select.select([self._read], [], [], 60)[0]
            data = os.read(self._read, 1 << 20) if ready else b''
            assert data, 'the browser has ended, or hangs'
            self._rest += data
        line, self._rest = self._rest.split(b'\0', 1)
        message = json.loads(line)
        if message.get('method') == 'Runtime.exceptionThrown':
            self.errors.append(message['params']['exceptionDetails'])
        if message.get('method') == 'Log.entryAdded':
            self.errors.append(message['params']['entry']['text'])
        return message

    def open(self, address: str) -> None:
        """Loads a page, or the same one again."""
        self._send('Page.navigate', url=address)
        self.wait(f'document.readyState == "complete" && location.href == {json.dumps(address)}')

    def run(self, script: str):
        """The value of an expression on the page; of a promise, what it becomes."""
        found = self._send('Runtime.evaluate', expression=script, awaitPromise=True,
                           returnByValue=True)
        assert 'exceptionDetails' not in found, found
        return found['result'].get('value')

    def wait(self, condition: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def key(self, name: str) -> None:
        """Presses and releases a key."""
        facts = {'key': name, 'code': name, 'windowsVirtualKeyCode': KEYS[name]}
        if name == 'Enter':
            facts['text'] = '\r'
        self._send('Input.dispatchKeyEvent', type='keyDown', **facts)
        self._send('Input.dispatchKeyEvent', type='keyUp', **facts)

    def type(self, text: str) -> None:
        self._send('Input.insertText', text=text)

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of an element that can be seen."""
        self.run(f'document.querySelector({json.dumps(selector)}).scrollIntoView()')
        x, y = self.run(f'(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('
                        f'{json.dumps(selector)}).getBoundingClientRect())')
        for kind in ('mousePressed', 'mouseReleased'):
            self._send('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left',
                       clickCount=1)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)
