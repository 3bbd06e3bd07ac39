"""The API's messages and stubs, generated from protos/cdam/v1. Not to be edited."""
