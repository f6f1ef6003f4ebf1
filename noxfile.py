"""The matrix of Python versions: ``nox`` runs what this machine has an interpreter for.

``scripts/test`` is what a change has to pass, on one Python. This runs the same checks on each of
them, in environments of their own, and so needs Debian's packages of ``scripts/setup`` but not its
``.venv``. Arguments after ``--`` go to pytest::

    pipx run nox -s tests-3.14 -- -m 'not vm and not kvm'
"""

import nox

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]

nox.options.sessions = ["style", "tests", "docs"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True


@nox.session
def style(session: nox.Session) -> None:
    """Style and types, which do not depend on the Python that runs them."""
    session.install("-e", ".[test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests, with real VMs on the engine that suits this host."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, where a warning is an error."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")
