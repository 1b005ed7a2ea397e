// The structures that `retrieval/kernel/list_search.py` fills: one partition, and the settings of one search.

#pragma once

#include <cstdint>

constexpr int64_t BLOCK_ROWS = 32, HALF_ROWS = 16; // of a block of packed codes

// One partition. Pointers are borrowed.
struct Lists {
    int64_t dim;
    int64_t num_lists;
    int64_t codes_per_row;         // even; the last one is padding where `dim` is odd
    int64_t dims_per_code;
    const float* codebooks;        // (codes_per_row, dims_per_code, 16)
    const uint8_t* const* codes;   // of each list, in blocks of 32 rows
    const int64_t* const* ids;     // of each list
    const int64_t* sizes;          // of each list
    const uint16_t* centroids;     // (num_lists, dim) bfloat16
    const int8_t* rounded;         // (num_lists, dim) centroids / units, for the walk through the graph
    const float* units;            // (num_lists,)
    const int32_t* links;          // of the graph, -1 for none
    const uint64_t* first_link;    // (num_lists + 1,)
    const int32_t* level_links;    // (levels + 1,) start of each level among the links of a list
    int64_t entry;
    int64_t top_level;
    const uint16_t* rows;          // (rows, dim) float16
    int64_t has_halves;            // whether a last block of at most HALF_ROWS rows has half of the bytes
};

// Whether the block that begins with the last `rows` rows of a list is a half.
inline bool is_half(const Lists& lists, int64_t rows) { return lists.has_halves && rows <= HALF_ROWS; }

// Bytes of the block that begins with the last `rows` rows of a list.
inline int64_t block_bytes(const Lists& lists, int64_t rows) {
    if (rows <= 0) return 0;
    return is_half(lists, rows) ? (lists.codes_per_row + 3) / 4 * 32 : 16 * lists.codes_per_row;
}

// The centroids in the directions in which they differ most. Pointers are borrowed.
struct Leading {
    int64_t dim;                   // number of directions
    const int8_t* directions;      // (dim, dim of the centroids) directions / direction_units
    const float* direction_units;  // (dim,)
    const int8_t* rounded;         // (num_lists, dim) parts of the centroids / units
    const float* units;            // (num_lists,)
};

// A condition that hides many rows.
struct Condition {
    int64_t lists;                 // that a search among all rows visits; this one visits at least as many
    int64_t compares_lists;        // whether the query is compared with all lists instead of a walk through the graph
    float distance;                // the search ends at a list that is so far: `CodeScan::distance`
    const Leading* leading;        // compares first in these directions; null: in all dimensions at once
};

struct Settings {
    int64_t k;
    int64_t lists;
    int64_t beam;                  // centroids that the walk through the graph keeps, at least `lists`
    int64_t candidates;
    const uint8_t* visible;        // (rows,) null: all are
    const Condition* condition;    // null: the search ends as among all rows
};
