"""What measurements and tests share: inputs, the accuracy rule, peers, timers, targets, lines of a table, files."""
