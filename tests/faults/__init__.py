"""What may go wrong around the scripts: kills, damaged and hostile files, limits, environments.

`make faults` runs them, `make test` a short form; `make faults KILLS=1000 FILES=10000` takes hours.
"""
