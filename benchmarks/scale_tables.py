def tables(f):
    return {}


def put(p, t):
    return p
