"""Operator contracts: schemas, fakes and autograd. Imports torch alone; ``kernels`` implement them."""
