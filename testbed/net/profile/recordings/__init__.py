"""Reading recorded links: packet-delivery times and tables of rate, delay and loss over time.

Packet-delivery files are Mahimahi's (mm-link(1)): one whole number a line, milliseconds, not descending; at each time a packet of
1500 bytes can be delivered. Tables are comma-separated with a line of column names. Lines that are blank, or begin with
``#``, say nothing::

    time_s,rate_mbps,delay_ms,loss_percent
    0,42.5,12,0
    1.5,38,14,0.1

Time is ``time_s``, ``time_ms`` or ``time_us``; rates are in ``_bps``, ``_kbps``, ``_mbps`` or ``_gbps`` (bits per second),
delays in ``_s``, ``_ms`` or ``_us``, losses are ``loss_percent`` or ``loss_fraction``. A name may say the way:
``rate_up_kbps``, ``rate_down_kbps``.
A light and a heavy train of packets, sent in turns, find two delays: ``delay_ms`` on a link with next to nothing to do, and
``loaded_delay_ms`` under load (CellReplay, NSDI 2025, records such pairs).
Two numbers a line between blanks, without names, are seconds and Mbit/s, as in the traces of Pensieve (and those that were
made for it out of the FCC's and HSDPA's).
Logs of G-NetTrack are understood as they are: ``Timestamp``, ``DL_bitrate`` and ``UL_bitrate`` (kbit/s) out of many columns; what
was idle or pinging in them is left out by ``skip=idle``. Models of netem-trace, which Rattan replays, are JSON or TOML
(`netem_trace`). Of any other table somebody says what its columns are (`columns`).

A value holds until the next row. Rows of the same time share the time up to the next one evenly; a value that is missing
(``-`` or nothing) is the one before; a gap is no outage: the last value holds over it. Times count from the first row. The
last row lasts as long as the one before it.
"""
