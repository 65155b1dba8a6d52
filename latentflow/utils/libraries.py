"""Messages of other libraries in our programs: errors only. Imports nothing of ours."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Turn off the warnings of diffusers and transformers and their bars of loading.

    For programs, which check what they load and have bars of their own; a script keeps what its user has set.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
