"""A Python function under a time limit: it runs in a process of its own, which is killed with its children when time is up."""

import contextlib
import functools
import multiprocessing.connection as connection
import os
import pickle
import sys
import traceback

from dzhpc.config import import_object, paths
from dzhpc.config.names import product
from dzhpc.errors import InputError, OutsideError, message_of
from dzhpc.job.program import Keeper, environment

START = 300.0  # seconds that the process may take to import the user's module, or the time limit of a call if that is more
FOREVER = 1e9


class Worker:
    """The object ``package.module:Name``, its calls and those of its methods made in another process, each within ``seconds``.

    key: what errors call it. threads: of OpenMP, unless the environment says it. makes: see :func:`dzhpc.config.names.product`.
    The process starts at the first call and anew after one that failed to come back. Arguments and results are pickled.
    Raises OutsideError for a call that raises, that ends the process, or that is late; InputError for a name that is none.
    """

    def __init__(self, name: str, key: str, seconds: float, threads: int = 1, makes: bool = False):
        self._what, self._seconds, self._threads = (name, key, makes), seconds, threads
        self._keeper: Keeper | None = None
        self._pipes: list[connection.Connection] = []
        if makes:  # an objective says at once which of the two it has
            self._start()

    def __call__(self, *arguments):
        """``Name(*arguments)``."""
        return self.call("__call__", *arguments)

    def initial(self):
        """``Name.initial()``, of an objective."""
        return self.call("initial")

    def call(self, method: str, *arguments):
        """``Name.method(*arguments)``."""
        if self._keeper is None:
            self._start()
        try:
            return self._exchange(pickle.dumps((method, arguments)), self._seconds)
        except (EOFError, OSError):
            self._stop()
            raise OutsideError("its process has ended in the middle of a call") from None

    def _start(self) -> None:
        """Start the process and wait until it has the object."""
        theirs, ours = os.pipe()
        answers, answer = os.pipe()
        output = [os.dup(1), os.dup(2)]
        for number in (ours, answers):
            os.set_inheritable(number, False)
        files = [theirs, answer, *output]
        self._keeper = Keeper(files=files)
        for number in files:
            os.close(number)
        self._pipes = [connection.Connection(ours, readable=False), connection.Connection(answers, writable=False)]
        words = [sys.executable, "-c", "from dzhpc.job.worker import serve; serve()", str(theirs), str(answer)]
        variables = {"OMP_NUM_THREADS": str(self._threads)} | environment()
        variables |= {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._keeper.ask(words, paths.started(), FOREVER, variables)
        try:
            if self._exchange(pickle.dumps(self._what), max(START, self._seconds)):
                self.residuals = functools.partial(self.call, "residuals")
        except (EOFError, OSError):
            self._stop()
            raise OutsideError("its process has ended before the first call") from None
        except Exception:
            self._stop()
            raise

    def _exchange(self, message: bytes, seconds: float):
        ask, answers = self._pipes
        ask.send_bytes(message)
        if not answers.poll(seconds):
            self._stop()
            raise OutsideError(f"had not answered after {seconds:g} s (task.timeout), and was killed")
        kind, *content = pickle.loads(answers.recv_bytes())
        if kind == "input":
            raise InputError(content[0])
        if kind == "raised":
            raise OutsideError(content[0], text=content[1])
        return content[0]

    def _stop(self) -> None:
        for each in (self._keeper, *self._pipes):
            if each is not None:
                each.close()
        self._keeper, self._pipes = None, []


def serve() -> None:
    """The process's own side."""
    ask, answers = (int(word) for word in sys.argv[1:3])
    ask, answers = connection.Connection(ask, writable=False), connection.Connection(answers, readable=False)
    found = None
    paths.start_here()
    with contextlib.suppress(EOFError):
        while True:
            message = pickle.loads(ask.recv_bytes())
            try:
                if found is None:
                    name, key, makes = message
                    found = (product if makes else import_object)(name, key)
                    given = callable(getattr(found, "residuals", None))
                elif not callable(method := getattr(found, message[0], None)):
                    raise InputError(f"{key} = {name}: has no {message[0]}()")
                else:
                    given = method(*message[1])
                answer = pickle.dumps(("gave", given))
            except InputError as error:
                answer = pickle.dumps(("input", str(error)))
            except KeyboardInterrupt:
                return
            except BaseException as error:  # the user's code may raise anything
                answer = pickle.dumps(("raised", message_of(error), "".join(traceback.format_exception(error))))
            sys.stdout.flush()
            answers.send_bytes(answer)
