"""The processes that a server is made of: front ends, compute processes, the board between them, the supervisor.

A `ComputeHost` is what computes, a `FrontEnd` the API over it. Both in one process are `bootstrap.Application`. In processes of their
own (`children`) they talk over local sockets (`wire`): `remote` is the front end's side, `service` the compute process's. Pixels travel by
shared memory (`ring`). The `supervisor` starts them, watches them, and ends them in order; what all must know at once is on the `board`.
"""
