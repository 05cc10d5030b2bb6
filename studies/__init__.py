"""Studies with a method of their own. Each is a package that registers what it adds, as a user's package does; the core
imports this one alone, and so knows none of them by name."""

from studies import cascade as cascade
