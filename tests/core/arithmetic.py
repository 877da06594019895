"""What the tests start from that work a paper's arithmetic out by hand: numbers of all signs and sizes, and zeros."""

START = [1.0, -2.0, 0.25, -0.5]
GRADIENTS = [
    [0.5, -2.0, 0.001, 0.0],
    [0.25, 4.0, -0.002, 0.3],
    [-1.0, 1.5, 0.008, -0.001],
    [0.75, -0.125, 0.0156, 0.0],
    [2.0, 3.0, -0.001, -0.3],
    [0.0, -1.0, 0.0625, 2.0],
    [0.01, -0.1, 0.0, -1.0],
]
