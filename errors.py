"""How the scripts speak of bad input: one line on standard error, exit status 2, no traceback."""

import errno
import sys


class UserError(Exception):
    """Something that the person at the keyboard can mend.

    The message is one line: what is wrong, where (file, flag, domain), what was found, what was expected, what to do.
    Programming errors are never wrapped in it, so that they keep their traceback.
    """


def run(main):
    """Call main(); turn a UserError, or a disk that is full or read-only, into one line and exit status 2."""
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        message = f"{error.filename or 'output'}: {error.strerror}; free some space or choose another --out_dir."
    else:
        return
    print(f"{sys.argv[0]}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
