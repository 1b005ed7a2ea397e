// Which URLs are canonical as they are, in the notation that nearly all have (`pipeline/web/urls.py`).

#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace {

constexpr int64_t MAX_LABEL_CHARS = 63;

constexpr std::array<bool, 256> set_of(std::string_view marks, bool has_capitals) {
    std::array<bool, 256> set{};
    for (int c = '0'; c <= '9'; ++c) set[c] = true;
    for (int c = 'a'; c <= 'z'; ++c) set[c] = true, set[c - 'a' + 'A'] = has_capitals;
    for (const char mark : marks) set[(uint8_t)mark] = true;
    return set;
}

constexpr auto LABEL = set_of("-_", false), PATH = set_of("!$%&'()*+,-./:;=?@[]_~", true);

// Whether a text is http:// or https://, a host of labels between dots, a slash, and characters of PATH. A host does
// not begin with a hyphen.
bool is_clean_url(const uint8_t* text, int64_t length) {
    const uint8_t* const end = text + length;
    if (length < 8 || std::memcmp(text, "http", 4)) return false;
    text += text[4] == 's' ? 5 : 4;
    if (end - text < 4 || std::memcmp(text, "://", 3) || text[3] == '-') return false;
    text += 2;
    do {
        const uint8_t* const label = ++text;
        while (text < end && LABEL[*text]) ++text;
        if (text == label || text - label > MAX_LABEL_CHARS) return false;
    } while (text < end && *text == '.');
    if (text == end || *text != '/') return false;
    bool is_clean = true;
    for (; text < end; ++text) is_clean &= PATH[*text];
    return is_clean;
}

} // namespace
