"""As much of GraphQL as the W&B SDK's queries need."""

import json
import re

TOKEN = re.compile(r'#[^\n]*|[\s,]+|("(?:\\.|[^"\\])*"|\.\.\.|[A-Za-z_]\w*|-?\d[\d.eE+-]*|.)')
LITERALS = {"true": True, "false": False, "null": None}


class Query:
    """One GraphQL document: parsed, then `answer`ed from nested dicts whose values may be functions of arguments."""

    def __init__(self, text, variables):
        self.tokens = [match[1] for match in TOKEN.finditer(text) if match[1]]
        self.at = 0  # the next token
        self.variables = dict(variables or {})
        self.fragments = {}  # name → selection
        self.name, self.fields = "", []  # of the operation
        while self.at < len(self.tokens):
            kind = self.take() if self.peek() != "{" else "query"
            name = self.take() if self.peek() not in "({" else ""
            if kind == "fragment":
                self.at += 2  # on Type
                self.fragments[name] = self.selection()
                continue
            self.name = name
            self.skip("{")  # the variables' types and defaults
            self.fields = self.selection()

    def peek(self):
        return self.tokens[self.at]

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1]

    def skip(self, end):
        while self.peek() != end:
            self.at += 1

    def value(self):
        token = self.take()
        if token == "$":
            return self.variables.get(self.take())
        if token == "[":
            values = []
            while self.peek() != "]":
                values.append(self.value())
            self.at += 1
            return values
        if token == "{":
            return self.pairs("}")
        if token[0] == '"' or token[0] == "-" or token[0].isdigit():
            return json.loads(token)
        return LITERALS.get(token, token)

    def pairs(self, end):
        found = {}
        while (name := self.take()) != end:
            self.at += 1  # the colon
            found[name] = self.value()
        return found

    def selection(self):
        """[(name in the answer or None for a spread, field, arguments, inner selection)]"""
        self.at += 1
        fields = []
        while (name := self.take()) != "}":
            key, arguments = name, {}
            if name == "..." and self.peek() != "on":
                key, name = None, self.take()
            elif name == "...":
                key, name, self.at = None, "", self.at + 2
            elif self.peek() == ":":
                self.at += 1
                name = self.take()
            if self.peek() == "(":
                self.at += 1
                arguments = self.pairs(")")
            if self.peek() == "@":  # @include(if: ...): the SDK does not mind a field more
                self.skip(")")
                self.at += 1
            fields.append((key, name, arguments, self.selection() if self.peek() == "{" else []))
        return fields

    def answer(self, value, fields=None):
        if isinstance(value, list):
            return [self.answer(item, fields) for item in value]
        if not isinstance(value, dict) or fields == []:
            return value
        found = {}
        for key, name, arguments, inner in self.fields if fields is None else fields:
            if key is None:
                found |= self.answer(value, self.fragments[name] if name else inner)
                continue
            child = value.get(name)
            child = child(**arguments) if callable(child) else child
            merged = self.answer(child, inner)
            # Two fragments may ask for the same object: the answer has the fields of both.
            found[key] = found[key] | merged if isinstance(found.get(key), dict) else merged
        return found
