"""The colours of reports by name, each on a light and on a dark ground; pages and figures share them."""

PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#fdfdfc", "#15181d"),
    "raised": ("#f2f4f6", "#1f242b"),
    "bad-ground": ("#fbecea", "#38201f"),
    "warning-ground": ("#faf1dc", "#332a17"),
    "good-ground": ("#e9f5ec", "#1b2e21"),
    "line": ("#d8dce2", "#363d47"),
    "ink": ("#1d2530", "#e5e9ee"),
    "quiet": ("#59636f", "#a3adb9"),
    "link": ("#1c5a9e", "#8abcf7"),
    "bad": ("#b3261e", "#ff8f85"),
    "warning": ("#7a5200", "#ecb95a"),
    "good": ("#1c6b36", "#79cf96"),
    "series0": ("#1f5fa9", "#7cb1f2"),
    "series1": ("#b04e05", "#f2a25c"),
    "series2": ("#2a7545", "#77c794"),
    "series3": ("#8a3f9e", "#d79ae6"),
    "series4": ("#0f7080", "#62c5d4"),
    "series5": ("#a5335d", "#f291b4"),
    "series6": ("#6b6410", "#d0c35a"),
    "series7": ("#5a5f66", "#b4bac1"),
}

GROUNDS = ("paper", "raised", "bad-ground", "warning-ground", "good-ground")
"""What text stands on; every other colour but `line` is one of letters or curves."""
