"""Attacks on where a body ends: two framings, spellings of one, lengths and chunks of no single meaning."""

from tests.walk.smuggling.payload import AUTH, CHUNKED, END, HIDDEN, Payload, chunk, length, request

#: Where the coding is believed, the hidden request follows the body; where the length is, it is the body.
LAST_CHUNK_AND_HIDDEN = END + HIDDEN

#: Spellings of `Transfer-Encoding: chunked` that some server takes for it and another does not.
OBFUSCATED = (
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding\t: chunked",
    b"Transfer-Encoding\x0b: chunked",
    b"Transfer-Encoding\x00: chunked",
    b"Transfer-Encoding\r: chunked",
    b"Transfer-Encoding\xa0: chunked",
    b" Transfer-Encoding: chunked",
    b"\tTransfer-Encoding: chunked",
    b"X: y\r\n Transfer-Encoding: chunked",
    b"X: y\r\n\tTransfer-Encoding: chunked",
    b"X: y\rTransfer-Encoding: chunked",
    b"X: y\nTransfer-Encoding: chunked",
    b"X: y\r\r\nTransfer-Encoding: chunked",
    b"X: y\x00\r\nTransfer-Encoding: chunked",
    b"X:\nTransfer-Encoding: chunked",
    b"\x00Transfer-Encoding: chunked",
    b"Transfer-Encoding",
    b"Transfer-Encoding chunked",
    b"Transfer-Encoding= chunked",
    b"Transfer_Encoding: chunked",
    b"Transfer-Encoding:\r\n chunked",
    b"Transfer-Encoding:\n chunked",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding:\x0cchunked",
    b"Transfer-Encoding: \x00chunked",
    b"Transfer-Encoding: chunked\x00",
    b"Transfer-Encoding: chunked\x0b",
    b"Transfer-Encoding: chunked\r",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow",
    b"Transfer-\r\n Encoding: chunked",
    b"Transfer\xadEncoding: chunked",
    "Transfer-Encod\u0131ng: chunked".encode(),
    "Tran\u017ffer-Encoding: chunked".encode(),
    b"(Transfer-Encoding): chunked",
    b"Transfer-Encoding;: chunked",
)
#: The same, but for servers only that read the field at all as it is written: another coding, which is not known here.
UNKNOWN_CODINGS = (
    b"Transfer-Encoding: x\r\ntransfer-encoding: chunked",
    b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding:",
    b"Transfer-Encoding: chunked\xa0",
    b"Transfer-Encoding: \xa0chunked",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunkedx",
    b"Transfer-Encoding: chunke",
    b"Transfer-Encoding: chu nked",
    b'Transfer-Encoding: "chunked"',
    b"Transfer-Encoding: 'chunked'",
    b"Transfer-Encoding: ,chunked",
    b"Transfer-Encoding: chunked,",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding: identity, chunked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: cow",
    b"Transfer-Encoding: cow, chunked",
    b"Transfer-Encoding: chunked, cow",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked;q=0",
    b"Transfer-Encoding: chunked;a=b",
    b"Transfer-Encoding: chunked; ",
    b"Transfer-Encoding: chunked foo",
    b"Transfer-Encoding: chun\xc2\xadked",
)
#: Values that are no length of one meaning; 5 where they are.
LENGTHS = (
    b"+5 -5 0x5 5,5 5,6 5; 5.0 5e0 5_0 0o5 5L NaN 5\xa0 \xd9\xa5 \xef\xbc\x95 0,5 5,0 -0 --5 *"
    b" 9223372036854775808 18446744073709551621 99999999999999999999999999"
).split(b" ") + [
    b"",
    b"5 5",
    b"5, 5",
    b"5\t5",
    b"5 \x00",
    b"\x0b5",
    b"5\x0c",
    b"5\r",
    b'"5"',
    b"5\r\n ",
    b"\r\n 5",
    b"1\r\n 0",
]

CL_TE = [
    *(
        Payload(
            f"both framings, {names}",
            request(*lines, body=LAST_CHUNK_AND_HIDDEN),
            (400,),
        )
        for names, lines in (
            ("length first", (length(LAST_CHUNK_AND_HIDDEN), CHUNKED)),
            ("coding first", (CHUNKED, length(LAST_CHUNK_AND_HIDDEN))),
            ("length of none", (b"Content-Length: 0", CHUNKED)),
            ("a short length", (b"Content-Length: 4", CHUNKED)),
            ("a long length", (b"Content-Length: 4000", CHUNKED)),
            ("nominated length", (b"Connection: Content-Length", b"Content-Length: 5", CHUNKED)),
            ("nominated coding", (b"Connection: Transfer-Encoding", b"Content-Length: 5", CHUNKED)),
        )
    ),
    Payload(
        "the length counts on after the last chunk", request(b"Content-Length: 6", CHUNKED, body=END + b"G"), (400,)
    ),
    Payload(
        "the coding ends before the length",
        request(
            b"Content-Length: 4", CHUNKED, body=b"5c\r\nGPOST / HTTP/1.1\r\nContent-Length: 15\r\n\r\nx=1\r\n0\r\n\r\n"
        ),
        (400,),
    ),
    Payload("HTTP/1.0 with a coding", request(CHUNKED, body=END + HIDDEN, line=b"POST /x HTTP/1.0"), (400,)),
]
TE_TE = [
    payload
    for spelling, status in (*((text, 400) for text in OBFUSCATED), *((text, 501) for text in UNKNOWN_CODINGS))
    for payload in (
        Payload(f"alone {spelling!r}", request(spelling, body=LAST_CHUNK_AND_HIDDEN), (400,), also=(status,)),
        Payload(
            f"with a length {spelling!r}",
            request(length(LAST_CHUNK_AND_HIDDEN), spelling, body=LAST_CHUNK_AND_HIDDEN),
            (400,),
            also=(status,),
        ),
        Payload(
            f"beside the real one {spelling!r}",
            request(CHUNKED, spelling, body=LAST_CHUNK_AND_HIDDEN),
            (400,),
            also=(status,),
        ),
    )
]
TE_PLAIN = [
    Payload(f"{spelling!r}", request(spelling, body=chunk(HIDDEN) + END), (200,))
    for spelling in (
        CHUNKED,
        b"transfer-encoding: chunked",
        b"TRANSFER-ENCODING: CHUNKED",
        b"Transfer-Encoding:chunked",
        b"Transfer-Encoding: \t chunked \t",
        b"X-Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        b"Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked",
    )
]
CL_CL = [
    *(Payload(f"{value!r}", request(b"Content-Length: " + value, body=b"hello" + HIDDEN), (400,)) for value in LENGTHS),
    *(
        Payload(f"{first!r} and {second!r}", request(first, second, body=b"hello" + HIDDEN), (400,))
        for first, second in (
            (b"Content-Length: 5", b"Content-Length: 5"),
            (b"Content-Length: 5", b"Content-Length: 0"),
            (b"Content-Length: 0", b"content-length: 5"),
            (b"Content-Length: 5", b"Content_Length: 6"),
            (b"Content_Length: 6", b"X: y"),
            (b"Content-Length: 5", b"Content-Length : 6"),
            (b"Content-Length : 5", b"X: y"),
            (b"Content-Length\t: 5", b"X: y"),
            (b"Content-Length\x00: 5", b"X: y"),
            (b"Content-Length\r: 5", b"X: y"),
            (b"Content-Length\xa0: 5", b"X: y"),
            (b"X: y\r\n Content-Length: 5", b"Z: y"),
            (b"X: y\nContent-Length: 5", b"Z: y"),
            (b"X: y\rContent-Length: 5", b"Z: y"),
            (b"X: y\x00Content-Length: 5", b"Z: y"),
            (b"Content-Length 5", b"X: y"),
            (b"Content-\r\n Length: 5", b"X: y"),
        )
    ),
]
#: Decimal to RFC 9110, octal to some.
LEADING_ZEROS = [
    Payload(f"{value!r}", request(b"Content-Length: " + value, body=b"hello" + HIDDEN), (400,))
    for value in (b"05", b"005", b"010", b"00")
]
#: The length is right, and the body looks like a request.
CL_0 = [
    *(
        Payload(
            f"{method.decode()} with a request as its body",
            request(length(HIDDEN), body=HIDDEN, line=method + b" /x HTTP/1.1"),
            (200,),
        )
        for method in (b"POST", b"PUT", b"GET", b"DELETE", b"OPTIONS", b"PATCH", b"QUERY")
    ),
    Payload("the same in chunks", request(CHUNKED, body=chunk(HIDDEN) + END, line=b"GET /x HTTP/1.1"), (200,)),
    Payload(
        "a real one behind it",
        request(length(HIDDEN), body=HIDDEN) + request(line=b"GET /y HTTP/1.1"),
        (200, 200),
        (b"/x", b"/y"),
    ),
    Payload("no length at all", request(body=HIDDEN), (200, 200), (b"/x", b"/smuggled")),
    Payload("a length of none", request(b"Content-Length: 0", body=HIDDEN), (200, 200), (b"/x", b"/smuggled")),
    Payload(
        "a body without a length, no request",
        request(body=b"hello\r\n\r\n"),
        (200, 400),
    ),
    Payload(
        "the last field hides the next request line",
        request(b"Content-Length: 8", body=b"x=1\r\nFoo") + b": " + HIDDEN,
        (200, 400),
    ),
    Payload(
        "the next one has no credential",
        request() + HIDDEN.replace(AUTH, b""),
        (200, 401),
    ),
]
PIPELINED = [
    Payload("three in one write", request() * 3, (200, 200, 200)),
    Payload("closed after the first", request(b"Connection: close") + HIDDEN, (200,)),
    Payload(
        "closed, with a nominated length",
        request(b"Connection: close, Content-Length", b"Content-Length: 5", body=b"hello") + HIDDEN,
        (200,),
    ),
    Payload("HTTP/1.0 ends the connection", request(line=b"GET /x HTTP/1.0") + HIDDEN, (200,)),
    Payload(
        "HTTP/1.0 that asks to keep it",
        request(b"Connection: keep-alive", line=b"GET /x HTTP/1.0") + HIDDEN,
        (200,),
    ),
    Payload("one empty line between", request() + b"\r\n" + request(), (200, 200)),
    Payload("two empty lines between", request() + b"\r\n\r\n" + request(), (200, 400)),
    Payload("a bare LF between", request() + b"\n" + request(), (200, 400)),
    Payload("garbage behind it", request(b"Content-Length: 5", body=b"helloG") + request(), (200, 200), (b"/x", b"/x")),
    Payload("a chunked body, then one", request(CHUNKED, body=chunk(b"a") + END) + request(), (200, 200)),
]
CHUNKS = [
    *(
        Payload(f"size {size!r}", request(CHUNKED, body=size + b"\r\nhello\r\n" + LAST_CHUNK_AND_HIDDEN), (400,))
        for size in (
            b"0x5 0X5 +5 -5 5h h \\x35 5.0 5,5 \xef\xbc\x95 5\x00 \x005 5\x0b 5= 5\xa0 5\xa0; %35"
            b" FFFFFFFFFFFFFFFF 7FFFFFFFFFFFFFFF 8000000000000005 10000000000000005 100000000000000000005"
        ).split(b" ")
        + [
            b"",
            b" 5",
            b"5 ",
            b"\t5",
            b"5\t",
            b"5 5",
            b"5 ;a=b",
            b"5\r",
            b"5\n",
            b"5\n\n",
            b"\r\n5",
            b"\n5",
            b"0" * 300 + b"5",
        ]
    ),
    *(
        Payload(f"size {size!r} is five", request(CHUNKED, body=size + b"\r\nhello\r\n" + END), (200,))
        for size in (b"5", b"05", b"000000000000005", b"5;a", b"5;a=b", b'5;a="b;c"', b"5;a=" + b"b" * 100)
    ),
    *(
        Payload(f"extension {extension!r}", request(CHUNKED, body=b"5;" + extension + b"\r\nhello\r\n" + END), (400,))
        for extension in (
            b"",
            b"a\nb",
            b"a\rb",
            b"a\n",
            b"a\r",
            b"\n",
            b"a\x00b",
            b"a\x0bb",
            b'a="\r\n"',
            b'a="\n0\r\n\r\n' + HIDDEN,
            b"a" * 300,
        )
    ),
    Payload(
        "many extensions",
        request(CHUNKED, body=(b"1;" + b"a" * 200 + b"\r\nx\r\n") * 100 + END),
        (400,),
    ),
    *(
        Payload(f"a chunk framed as {body!r}", request(CHUNKED, body=body), (400,))
        for body in (
            b"5\r\nhello0\r\n\r\n",
            b"5\r\nhelloX\r\n0\r\n\r\n",
            b"5\r\nhello\n0\r\n\r\n",
            b"5\r\nhello\r0\r\n\r\n",
            b"5\nhello\n0\n\n",
            b"5\nhello\r\n0\r\n\r\n",
            b"5\rhello\r\n0\r\n\r\n",
            b"5\r\nhello\r\n0\n\n",
            b"5\r\nhello\r\n0\r\n\n",
            b"5\r\nhello\r\n0\r\nX\r\n\r\n",
            b"5\r\nhello\r\n0\r\n\x00\r\n\r\n",
            b"5\r\nhello\r\n0\r\n X: y\r\n\r\n",
            b"5\r\nhello\r\n0\r\nX : y\r\n\r\n",
            b"5\r\nhello\r\n0\r\nX: y\nZ: z\r\n\r\n",
            b"5\r\nhello\r\n0\r\nX: y\r\n\n\r\n\r\n",
            b"5\r\nhello\r\n0\r\nContent-Length: 5\r\n\r\n",
            b"5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"5\r\nhello\r\n0\r\nHost: b\r\n\r\n",
            b"5\r\nhello\r\n0\r\ncontent_length: 5\r\n\r\n",
            b"5\r\nhello\r\n0\r\n: x\r\n\r\n",
            b"4\r\nhello\r\n0\r\n\r\n",
            b"6\r\nhello\r\n0\r\n\r\n",
            b"\r\n5\r\nhello\r\n0\r\n\r\n",
        )
    ),
    Payload("a trailer", request(CHUNKED, body=b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"), (200,)),
    Payload("forged trailers", request(CHUNKED, body=b"5\r\nhello\r\n0\r\nX-Org-Id: b\r\nX_Org_Id: b\r\n\r\n"), (200,)),
    Payload("a request behind the last chunk", request(CHUNKED, body=END + HIDDEN), (200, 200), (b"/x", b"/smuggled")),
    Payload("garbage behind the last chunk", request(CHUNKED, body=END + b"GARBAGE\r\n\r\n"), (200, 400)),
    Payload("a chunk behind the last", request(CHUNKED, body=END + chunk(HIDDEN)), (200, 400)),
    Payload("a second end", request(CHUNKED, body=END + END), (200, 400)),
    Payload("zeros for a last chunk", request(CHUNKED, body=chunk(HIDDEN) + b"0000\r\n\r\n"), (200,)),
    Payload("an extension on the last", request(CHUNKED, body=chunk(HIDDEN) + b"0;a=b\r\n\r\n"), (200,)),
]
