"""The Hub: whether it can be asked, found out once, so that a machine without it takes what it has at once."""

import functools
import logging
import os
import sys

log = logging.getLogger(__name__)

CLIENTS = ("httpx", "httpx2")  # packages that huggingface_hub speaks through, by its version: their errors are those of the network
LONGEST_WAIT = 10.0  # seconds


@functools.cache
def hub_away() -> str | None:
    """Return why the Hub is not asked, None where it is. The first call asks it; call it before the libraries do.

    Each file that they ask in vain for takes them half a minute. Where the Hub is not reached they ask no more, in this process and
    in those that it starts: what lies in the Hub's cache is taken.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=LONGEST_WAIT)
    except Exception as error:
        if not is_of_network(error):
            raise
        away = f"{constants.ENDPOINT} cannot be reached: {' '.join(str(error).split())[:120] or type(error).__name__}"
    else:
        return None
    log.info("%s; what is in this machine's cache of the Hub is used", away)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # has copied it
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return away


def is_of_network(error: BaseException) -> bool:
    """Say whether an error is one that the client of huggingface_hub's, or the system under it, has with the network."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in CLIENTS


def is_for_want_of_it(error: BaseException | None) -> bool:
    """Say whether an error is for want of a file that is not in the cache, where the Hub is not asked."""
    while error is not None:
        if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled") or "OfflineModeIsEnabled" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
