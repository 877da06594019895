"""Several processes on one port and one store: `ravine serve --workers N`.

Every worker is a whole service and may serve every session, since the head of a session in the store alone says what
holds. What is done here makes them fast together: each session is hot in one of them.

    supervisor.py   binds the port, forks the workers, starts those again that die, stops all
    berth.py        which worker this is, and how it finds the others
    routing.py      whose session a request is for; the protocol that looks, and hands connections over
    links.py        connections from one process to another, by SCM_RIGHTS
    scrape.py       /metrics of one, for all

**Who accepts.** All workers listen on the one socket that the supervisor bound: as long as one lives, who comes is
taken. With a socket for each (SO_REUSEPORT) the kernel spreads connections evenly, but whoever falls to a worker that
died waits for it to come back. That some accept more than others is no harm: they do not keep what they accept.

**Who serves.** The home of a session is a worker by a hash of its id. When a request comes that names another's
session, and the connection is between two requests, the connection itself goes to the home, with the bytes that came:
a client that stays with a session is handed over once, and from then on nothing of ours is in between. A process in
front that proxies would copy every byte twice, and be what all wait for; a redirect would show clients addresses.
Where the home is away, hangs, or takes no more, the worker serves the request itself. That is always right, and costs
what it costs a replica to serve a session that another one has hot: a look at the head, and the tail of the log.
"""
