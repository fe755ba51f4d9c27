"""The thread that looks for changes of the catalog which other processes made."""

import logging
import threading
from collections.abc import Callable

from weft.adapters.catalog_index import CatalogIndex
from weft.adapters.identifiers import AdapterId
from weft.errors import WeftError

_PERIOD_S = 0.25

_log = logging.getLogger(__name__)


class CatalogWatch:
    """Refreshes an index every 0.25 s. changed(ids): called on this thread for those that changed."""

    def __init__(self, index: CatalogIndex, changed: Callable[[set[AdapterId]], None]) -> None:
        self._index = index
        self._changed = changed
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weft-catalog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; it may still be in its last round when this returns."""
        self._stopped.set()

    def _run(self) -> None:
        last = ""
        while not self._stopped.wait(_PERIOD_S):
            try:
                self._index.refresh()
                ids = self._index.take_changed()
                if ids:
                    self._changed(ids)
                fault = ""
            except WeftError as error:  # until the disk can be read again
                fault = error.message
            except Exception:
                _log.exception("following the catalog failed")
                fault = "internal error"
            if fault and fault != last:
                _log.warning("store: changes of other servers cannot be seen: %s", fault)
            last = fault
