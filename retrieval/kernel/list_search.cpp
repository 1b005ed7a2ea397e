// Searches the inverted lists of faiss.IndexIVFPQFastScan for single queries, and ranks the candidates by float16 rows.
// For builds it ranks the centroids nearest to rows (centroid_ranking.h), computes codes (row_codes.h) and
// converts numbers and rows (conversions.h); for ids it finds clean URLs (clean_urls.h) and hashes texts (sha256.h).
//
// Reads packed 4-bit codes and rows in mapped files, and copies of the ids and of the graph over centroids. It works
// as faiss does, but walks by 8-bit centroids, leaves out lists and candidates that probably are no neighbors, and
// fetches the next codes and rows meanwhile, so that it rarely waits for memory. Where all lists and candidates are
// wanted, it ranks all rows. Nothing is checked here: `retrieval/kernel/layout.py` did. Needs AVX2, FMA and F16C.

#include <immintrin.h>

#include "centroid_ranking.h"
#include "clean_urls.h"
#include "code_scan.h"
#include "conversions.h"
#include "few_rows.h"
#include "filtered_lists.h"
#include "graph_walk.h"
#include "inner_products.h"
#include "lists.h"
#include "ranking.h"
#include "row_codes.h"
#include "sha256.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <thread>
#include <vector>

namespace {

constexpr int64_t QUERIES_AT_ONCE = 4; // or rows that a thread takes from a batch
constexpr int64_t FIRST_LISTS = 8;     // that a walk finds at first; twice as many each time that they do not suffice
constexpr size_t CENTROIDS_AHEAD = 4; // of lists that are fetched before they are compared exactly
constexpr int64_t SPARE_CANDIDATES = 32; // that are sorted at first in addition to 2 for each result

// What a thread needs while it searches. It is kept for the next queries.
struct Scratch {
    WalkScratch walk;
    ScanScratch scan;
    RankScratch rank;
};

class Search {
  public:
    Search(const Lists& lists, const Settings& settings, Scratch& scratch)
        : lists_(lists), settings_(settings), scratch_(scratch), walk_(lists, scratch.walk),
          scan_(lists, settings, scratch.scan), ranking_(lists, settings, scratch.rank) {}

    void run(const float* query, float* similarities, int64_t* rows) {
        query_ = query;
        if (settings_.lists >= lists_.num_lists && settings_.candidates >= num_entries())
            rank_all();
        else
            rank_best();
        ranking_.write(similarities, rows);
    }

    // Ranks the best candidates. Returns the number of lists that were scanned.
    int64_t measure(const float* query) {
        query_ = query;
        rank_best();
        return scan_.scanned();
    }

    // How far the lists are at which a search ends: `CodeScan::distance`. Ranks no candidates.
    float distance(const float* query) {
        query_ = query;
        scan();
        return scan_.distance();
    }

    // Writes the rows of the candidates that were ranked, best score first, those of both lists of a row. Returns how many.
    int64_t write_ranked(int64_t* rows) const {
        const auto& keys = scratch_.scan.keys;
        const int64_t count = ranking_.ranked(keys.size());
        for (int64_t i = 0; i < count; ++i) rows[i] = *scan_.id(keys[i]);
        return count;
    }

  private:
    void rank_best() {
        scan();
        scan_.reduce();
        rank();
    }

    // Scans the lists from the nearest on, until the scan ends or all `lists` of the settings are scanned.
    void scan() {
        auto& visits = scratch_.scan.visits;
        visits.clear();
        if (compares_lists())
            walk_.compare_all(query_, settings_.condition->leading);
        else
            walk_.start(query_);
        // After a comparison with all lists more are found at once, because that takes little time.
        const int64_t first = compares_lists() ? 2 * settings_.condition->lists : FIRST_LISTS;
        for (int64_t lists = std::min(first, settings_.lists);; lists = std::min(2 * lists, settings_.lists)) {
            const size_t scanned = visits.size();
            order(walk_.widen(lists + settings_.beam - settings_.lists), lists);
            if (!scanned) scan_.start(query_);
            if (!scan_.run(scanned) || lists == settings_.lists) break;
        }
    }

    // Rows of all lists; a row counts for each of its lists.
    int64_t num_entries() const { return std::accumulate(lists_.sizes, lists_.sizes + lists_.num_lists, int64_t(0)); }

    // Ranks all visible rows, without their codes: with scores and a scale of 0 the ranking never ends early.
    void rank_all() {
        ranking_.start(num_entries());
        for (int64_t list = 0; list < lists_.num_lists; ++list)
            for (const int64_t *id = lists_.ids[list], *end = id + lists_.sizes[list]; id != end; ++id)
                if (!settings_.visible || settings_.visible[*id]) ranking_.add({*id, 0, 0});
        ranking_.run(query_, 0);
    }

    // Adds the lists of a beam that are nearest to the query and were not visited, so that there are `lists` visits.
    void order(std::vector<BeamList>& beam, size_t lists) {
        auto& visits = scratch_.scan.visits;
        const size_t scanned = visits.size();
        for (size_t i = 0; i < beam.size(); ++i) {
            if (beam[i].visited) continue;
            if (i + CENTROIDS_AHEAD < beam.size() && !compares_lists())
                fetch(centroid(beam[i + CENTROIDS_AHEAD].list), 2 * lists_.dim);
            visits.push_back({similarity(beam[i]), int32_t(i)});
        }
        std::sort(visits.begin() + scanned, visits.end());
        if (visits.size() > lists) visits.resize(lists);
        for (size_t i = scanned; i < visits.size(); ++i) {
            BeamList& chosen = beam[visits[i].list];
            chosen.visited = true;
            visits[i].list = chosen.list;
        }
        if (scanned < visits.size()) fetch(lists_.codes[visits[scanned].list], BLOCK_ROWS * lists_.codes_per_row / 2);
    }

    // Ranks the candidates from the best score on, and sorts them only so far.
    void rank() {
        auto& keys = scratch_.scan.keys;
        ranking_.start(keys.size());
        size_t start = 0, end = 2 * settings_.k + SPARE_CANDIDATES;
        for (bool more = true; more && start < keys.size(); start = end, end *= 2) {
            end = std::min(end, keys.size());
            if (end < keys.size()) std::nth_element(keys.begin() + start, keys.begin() + end, keys.end());
            for (size_t i = start; i < end; ++i) __builtin_prefetch(scan_.id(keys[i]));
            std::sort(keys.begin() + start, keys.begin() + end);
            for (size_t i = start; i < end; ++i) ranking_.add({*scan_.id(keys[i]), scan_.score(keys[i]), uint32_t(i)});
            more = ranking_.run(query_, scan_.scale());
        }
    }

    // Similarity of a list to the query: exact after a walk. After a comparison with all lists that of the rounded
    // numbers, because many lists are visited, and their scores have larger errors.
    float similarity(const BeamList& near) const {
        if (compares_lists()) return walk_.scaled(near.similarity);
        return inner_product<Bfloat>(query_, centroid(near.list), lists_.dim);
    }

    bool compares_lists() const { return settings_.condition && settings_.condition->compares_lists; }

    const uint16_t* centroid(int32_t list) const { return lists_.centroids + list * lists_.dim; }

    const Lists& lists_;
    const Settings& settings_;
    Scratch& scratch_;
    GraphWalk walk_;
    CodeScan scan_;
    Ranking ranking_;
    const float* query_ = nullptr;
};

// Calls work(start, end) until all of `count` queries are done, in at most so many threads. Returns 0, or 1 without
// memory.
template <class Work>
int in_threads(int64_t count, int64_t threads, Work work) try {
    std::atomic<int64_t> next{0};
    std::atomic<int> failed{0};
    auto run = [&] {
        try {
            for (int64_t start; (start = next.fetch_add(QUERIES_AT_ONCE)) < count;)
                work(start, std::min(start + QUERIES_AT_ONCE, count));
        } catch (const std::exception&) {
            failed = 1;
        }
    };
    std::vector<std::thread> others;
    const int64_t wanted = std::min(threads, (count + QUERIES_AT_ONCE - 1) / QUERIES_AT_ONCE) - 1;
    others.reserve(std::max<int64_t>(wanted, 0));
    try {
        while (int64_t(others.size()) < wanted) others.emplace_back(run);
    } catch (const std::exception&) {
        // The machine starts no more threads: those that run do the work.
    }
    run();
    for (auto& thread : others) thread.join();
    return failed;
} catch (const std::exception&) {
    return 1;
}

} // namespace

extern "C" {

// Whether this processor has the instructions of this library.
int is_supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// queries (count, dim). Writes similarities and row numbers, each (count, k), best first, (-inf, -1) where there are
// fewer. Returns 0, or 1 without memory.
int search(const Lists* lists, const Settings* settings, int64_t count, const float* queries, float* similarities,
           int64_t* rows, int64_t threads) {
    return in_threads(count, threads, [&](int64_t start, int64_t end) {
        static thread_local Scratch scratch;
        for (int64_t i = start; i < end; ++i)
            Search(*lists, *settings, scratch)
                .run(queries + i * lists->dim, similarities + i * settings->k, rows + i * settings->k);
    });
}

// Counts the visible rows of each list, as the sizes of copies, and writes the bytes of their codes.
void count_visible(const Lists* lists, const uint8_t* visible, const Lists* copies, int64_t* code_bytes) {
    for (int64_t list = 0; list < lists->num_lists; ++list) {
        const int64_t *ids = lists->ids[list], *end = ids + lists->sizes[list];
        const int64_t size = std::count_if(ids, end, [&](int64_t row) { return visible[row]; });
        const_cast<int64_t*>(copies->sizes)[list] = size;
        code_bytes[list] =
            size / BLOCK_ROWS * block_bytes(*copies, BLOCK_ROWS) + block_bytes(*copies, size % BLOCK_ROWS);
    }
}

// Copies the entries of visible rows to lists of `count_visible` rows, with codes of zeros.
void copy_visible(const Lists* lists, const uint8_t* visible, const Lists* copies) {
    for (int64_t list = 0; list < lists->num_lists; ++list) copy_list(*lists, visible, list, *copies);
}

// Searches one query (dim,) and writes what was read: the number of lists to `scanned`, and the rows of the candidates
// that were ranked, best score first, to `rows` (candidates,). Returns their number, or -1 without memory.
int64_t measure(const Lists* lists, const Settings* settings, const float* query, int64_t* scanned, int64_t* rows) try {
    static thread_local Scratch scratch;
    Search search(*lists, *settings, scratch);
    *scanned = search.measure(query);
    return search.write_ranked(rows);
} catch (const std::exception&) {
    return -1;
}

// Writes for each of the queries (count, dim) how far the lists are at which its search ends. Returns 0, or 1 without
// memory.
int distances(const Lists* lists, const Settings* settings, int64_t count, const float* queries, float* distances) try {
    static thread_local Scratch scratch;
    for (int64_t i = 0; i < count; ++i)
        distances[i] = Search(*lists, *settings, scratch).distance(queries + i * lists->dim);
    return 0;
} catch (const std::exception&) {
    return 1;
}

// Compares queries (count, dim) with all of a few rows. Writes and returns as `search`.
int search_few(const FewRows* rows, int64_t k, int64_t count, const float* queries, float* similarities,
               int64_t* results, int64_t threads) {
    return in_threads(count, threads, [&](int64_t start, int64_t end) {
        FewRowsSearch search(*rows);
        for (int64_t i = start; i < end; ++i)
            search.run(queries + i * rows->dim, k, similarities + i * k, results + i * k);
    });
}

// Writes the codes of rows in lists, (count, bytes a row). Returns 0, or 1 without memory.
int encode(const RowCodes* codes, int64_t count, const int64_t* rows, const int64_t* lists, uint8_t* bytes,
           int64_t threads) {
    const int64_t size = (codes->dim / 2 + 1) / 2;
    return in_threads(count, threads, [&](int64_t start, int64_t end) {
        RowEncoder encoder(*codes);
        for (int64_t i = start; i < end; ++i) encoder.run(rows[i], lists[i], bytes + i * size);
    });
}

// Ranks centroids for rows (count, dim) by rough products (count, centroids), float32, or bfloat16 if is_rounded. Writes
// similarities and numbers of the k nearest, (count, k). Returns 0, or 1 without memory.
int rank_centroids(const Centroids* centroids, int64_t count, int64_t is_rounded, int64_t k, const void* products,
                   const float* rows, float* similarities, int64_t* numbers, int64_t threads) {
    return in_threads(count, threads, [&](int64_t start, int64_t end) {
        CentroidRanking ranking(*centroids);
        for (int64_t i = start; i < end; ++i) {
            const float* row = rows + i * centroids->dim;
            const int64_t first = i * centroids->count;
            if (is_rounded)
                ranking.run<Bfloat>((const uint16_t*)products + first, row, k, similarities + i * k, numbers + i * k);
            else
                ranking.run<Single>((const float*)products + first, row, k, similarities + i * k, numbers + i * k);
        }
    });
}

// Converts numbers (count,), each way.
void to_floats(const uint16_t* values, int64_t count, float* results) { convert(values, count, results); }
void to_halves(const float* values, int64_t count, uint16_t* results) { convert(values, count, results); }

// Writes rows (count, dim) divided by their lengths. Returns whether all lengths are in the range of `to_unit`.
int to_units(const float* rows, int64_t count, int64_t dim, float* units) {
    for (int64_t i = 0; i < count; ++i)
        if (!to_unit(rows + i * dim, dim, units + i * dim)) return 0;
    return 1;
}

// Writes the SHA-256 of texts, (count, 32). offsets: of each text and of the end, into `bytes`.
void hash_texts(const uint8_t* bytes, const int32_t* offsets, int64_t count, uint8_t* digests) {
    for (int64_t i = 0; i < count; i += TEXTS_AT_ONCE)
        hash_group(bytes, offsets + i, std::min<int64_t>(count - i, TEXTS_AT_ONCE), digests + 32 * i);
}

// Writes which of the texts, as in `hash_texts`, are clean URLs of at most `max_length` bytes, (count,) of 0 or 1.
void find_clean_urls(const uint8_t* bytes, const int32_t* offsets, int64_t count, int64_t max_length, bool* results) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t length = offsets[i + 1] - offsets[i];
        results[i] = length <= max_length && is_clean_url(bytes + offsets[i], length);
    }
}

} // extern "C"
