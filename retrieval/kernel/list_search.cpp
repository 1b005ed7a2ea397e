// Searches the inverted lists of faiss.IndexIVFPQFastScan for single queries, and ranks the candidates by float16 rows.
//
// Reads the memory of faiss (graph over the centroids, packed 4-bit codes, ids) and the mapped rows. It works as faiss
// does, but walks by 8-bit centroids and fetches the next codes and rows while it works, so that it rarely waits for
// memory. Nothing is checked here: `retrieval/kernel/layout.py` did. Needs AVX2, FMA and F16C.

#include <immintrin.h>

#include "graph_walk.h"
#include "inner_products.h"
#include "lists.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

constexpr int64_t BLOCK_ROWS = 32;     // rows of a block of packed codes
constexpr int64_t ROWS_AHEAD = 4;      // rows that are fetched before they are ranked
constexpr int64_t QUERIES_AT_ONCE = 4; // that a thread takes from a batch
constexpr int OFFSET_BITS = 28, LIST_BITS = 20;

struct Neighbor {
    float similarity;
    int64_t row;
    bool operator<(const Neighbor& other) const {
        return similarity != other.similarity ? similarity > other.similarity : row < other.row;
    }
};

// What a thread needs while it searches. It is kept for the next queries.
struct Scratch {
    WalkScratch walk;
    std::vector<Visited> beam;
    std::vector<float> products;
    std::vector<uint8_t> tables;
    std::vector<uint64_t> keys;
    std::vector<int64_t> rows;
    std::vector<Neighbor> neighbors;
};

class Search {
  public:
    Search(const Lists& lists, const Settings& settings, Scratch& scratch)
        : lists_(lists), settings_(settings), scratch_(scratch), beam_(scratch.beam), keys_(scratch.keys) {}

    void run(const float* query, float* similarities, int64_t* rows) {
        query_ = query;
        GraphWalk(lists_, scratch_.walk, beam_).run(query, settings_.beam);
        order();
        fetch(lists_.codes[beam_[0].list], BLOCK_ROWS * lists_.codes_per_row / 2);
        tables();
        scan();
        rank(similarities, rows);
    }

  private:
    // Leaves the `settings.lists` lists nearest to the query in `beam_`, nearest first, with their similarities.
    void order() {
        for (size_t i = 0; i < beam_.size(); ++i) {
            if (i + 2 < beam_.size()) fetch(lists_.centroids + beam_[i + 2].list * lists_.dim, 2 * lists_.dim);
            beam_[i].similarity = inner_product<Bfloat>(query_, lists_.centroids + beam_[i].list * lists_.dim, lists_.dim);
        }
        std::sort(beam_.begin(), beam_.end());
        if (beam_.size() > size_t(settings_.lists)) beam_.resize(settings_.lists);
    }

    // Inner products of the query with all codewords, and from them bytes: round((product - least) * scale_).
    void tables() {
        const int64_t codes = lists_.codes_per_row, dims = lists_.dims_per_code;
        auto& products = scratch_.products;
        products.resize(17 * codes);
        float* least = products.data() + 16 * codes;
        float largest_span = 1e-20f, total = beam_.front().similarity - beam_.back().similarity + 1e-20f;
        for (int64_t code = 0; code < codes; ++code) {
            __m256 low = _mm256_setzero_ps(), high = low;
            for (int64_t i = code * dims; i < std::min((code + 1) * dims, lists_.dim); ++i) {
                const __m256 value = _mm256_set1_ps(query_[i]);
                low = _mm256_fmadd_ps(value, _mm256_loadu_ps(lists_.codebooks + 16 * i), low);
                high = _mm256_fmadd_ps(value, _mm256_loadu_ps(lists_.codebooks + 16 * i + 8), high);
            }
            _mm256_storeu_ps(&products[16 * code], low);
            _mm256_storeu_ps(&products[16 * code + 8], high);
            least[code] = smallest(_mm256_min_ps(low, high));
            const float span = -smallest(_mm256_sub_ps(_mm256_setzero_ps(), _mm256_max_ps(low, high))) - least[code];
            largest_span = std::max(largest_span, span);
            total += span;
        }
        // The sums of bytes stay below 2^16, also if all are rounded up.
        scale_ = std::min(255 / largest_span, (65535 - codes - 1) / total);
        scratch_.tables.resize(16 * codes);
        const __m256 scale = _mm256_set1_ps(scale_);
        for (int64_t code = 0; code < codes; ++code) {
            __m256i numbers[2];
            for (int half = 0; half < 2; ++half) {
                const __m256 above = _mm256_loadu_ps(&products[16 * code + 8 * half]) - _mm256_set1_ps(least[code]);
                numbers[half] = _mm256_cvtps_epi32(_mm256_mul_ps(above, scale));
            }
            __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(numbers[0], numbers[1]), 0xd8);
            __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
            _mm_storeu_si128((__m128i*)&scratch_.tables[16 * code], bytes);
        }
    }

    // Keeps the best candidates of the lists in `beam_` as keys: score, then order of the visits.
    void scan() {
        keys_.clear();
        least_ = 0;
        float far = beam_.back().similarity;
        const int64_t bytes = BLOCK_ROWS * lists_.codes_per_row / 2;
        for (size_t i = 0; i < beam_.size(); ++i) {
            const uint8_t* codes = lists_.codes[beam_[i].list];
            const int64_t size = lists_.sizes[beam_[i].list];
            const __m256i bias = _mm256_set1_epi16(uint16_t((beam_[i].similarity - far) * scale_ + 0.5f));
            const int64_t* ids = lists_.ids[beam_[i].list];
            for (int64_t start = 0; start < size; start += BLOCK_ROWS, codes += bytes) {
                const uint8_t* next = codes + bytes;
                if (start + BLOCK_ROWS >= size) next = lists_.codes[beam_[std::min(i + 1, beam_.size() - 1)].list];
                __m256i scores[2];
                score(codes, next, scores);
                for (int half = 0; half < 2; ++half) {
                    scores[half] = _mm256_add_epi16(scores[half], bias);
                    keep(scores[half], i, start + 16 * half, size, ids);
                }
            }
        }
        reduce();
    }

    // Sums of the table bytes of 32 rows, as 2 x 16 unsigned 16-bit numbers. Fetches the block `next` meanwhile.
    void score(const uint8_t* block, const uint8_t* next, __m256i* scores) const {
        const __m256i nibble = _mm256_set1_epi8(15);
        __m256i both[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, odd[2] = {both[0], both[0]};
        const int64_t pairs = lists_.codes_per_row / 2;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            if (pair % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(next) + 32 * pair, _MM_HINT_T0);
            const __m256i codes = _mm256_loadu_si256((const __m256i*)(block + 32 * pair));
            const __m256i table = _mm256_loadu_si256((const __m256i*)(scratch_.tables.data() + 32 * pair));
            const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, nibble));
            const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
            both[0] = _mm256_add_epi16(both[0], low);
            odd[0] = _mm256_add_epi16(odd[0], _mm256_srli_epi16(low, 8));
            both[1] = _mm256_add_epi16(both[1], high);
            odd[1] = _mm256_add_epi16(odd[1], _mm256_srli_epi16(high, 8));
        }
        for (int half = 0; half < 2; ++half) {
            const __m256i even = _mm256_sub_epi16(both[half], _mm256_slli_epi16(odd[half], 8));
            scores[half] = _mm256_add_epi16(
                _mm256_permute2x128_si256(even, odd[half], 0x20), _mm256_permute2x128_si256(even, odd[half], 0x31));
        }
    }

    // Adds the rows above the threshold. first: number of the first row in its list.
    void keep(__m256i scores, size_t visit, int64_t first, int64_t size, const int64_t* ids) {
        const __m256i above = _mm256_subs_epu16(scores, _mm256_set1_epi16(uint16_t(least_)));
        uint32_t mask = ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi16(above, _mm256_setzero_si256())));
        if (keys_.size() < size_t(settings_.candidates)) mask = ~0u; // a score of 0 counts too
        if (size - first < 16) mask &= size > first ? (1u << 2 * (size - first)) - 1 : 0;
        if (!mask) return;
        alignas(32) uint16_t values[16];
        _mm256_store_si256((__m256i*)values, scores);
        for (mask &= 0x55555555; mask; mask &= mask - 1) {
            const int64_t i = __builtin_ctz(mask) / 2, offset = first + i;
            if (settings_.visible && !settings_.visible[ids[offset]]) continue;
            keys_.push_back(uint64_t(65535 - values[i]) << (LIST_BITS + OFFSET_BITS) | visit << OFFSET_BITS | offset);
        }
        if (keys_.size() >= size_t(2 * settings_.candidates + BLOCK_ROWS)) reduce();
    }

    // Drops all keys but the best `candidates`.
    void reduce() {
        if (keys_.size() <= size_t(settings_.candidates)) return;
        std::nth_element(keys_.begin(), keys_.begin() + settings_.candidates - 1, keys_.end());
        keys_.resize(settings_.candidates);
        least_ = 65535 - int64_t(keys_.back() >> (LIST_BITS + OFFSET_BITS));
    }

    // The k candidates with the largest inner products.
    void rank(float* similarities, int64_t* results) {
        auto& rows = scratch_.rows;
        auto& neighbors = scratch_.neighbors;
        rows.clear();
        for (uint64_t key : keys_) __builtin_prefetch(id(key));
        for (uint64_t key : keys_) rows.push_back(*id(key));
        std::sort(rows.begin(), rows.end());
        rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
        neighbors.clear();
        const int64_t count = rows.size();
        for (int64_t i = 0; i < std::min(count, ROWS_AHEAD); ++i) fetch(row(rows[i]), 2 * lists_.dim);
        for (int64_t i = 0; i < count; ++i) {
            if (i + ROWS_AHEAD < count) fetch(row(rows[i + ROWS_AHEAD]), 2 * lists_.dim);
            neighbors.push_back({inner_product<Half>(query_, row(rows[i]), lists_.dim), rows[i]});
        }
        const int64_t best = std::min(count, settings_.k);
        std::partial_sort(neighbors.begin(), neighbors.begin() + best, neighbors.end());
        for (int64_t i = 0; i < settings_.k; ++i) {
            similarities[i] = i < best ? std::clamp(neighbors[i].similarity, -1.f, 1.f)
                                       : -std::numeric_limits<float>::infinity();
            results[i] = i < best ? neighbors[i].row : -1;
        }
    }

    const int64_t* id(uint64_t key) const {
        const Visited& visited = beam_[(key >> OFFSET_BITS) & ((1 << LIST_BITS) - 1)];
        return lists_.ids[visited.list] + (key & ((1 << OFFSET_BITS) - 1));
    }

    const uint16_t* row(int64_t number) const { return lists_.rows + number * lists_.dim; }

    const Lists& lists_;
    const Settings& settings_;
    Scratch& scratch_;
    std::vector<Visited>& beam_;
    std::vector<uint64_t>& keys_;
    const float* query_ = nullptr;
    float scale_ = 0;
    int64_t least_ = 0;
};

} // namespace

extern "C" {

// Whether this processor has the instructions of this library.
int is_supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// queries (count, dim). Writes similarities and row numbers, each (count, k), best first, (-inf, -1) where there are
// fewer. Returns 0, or 1 without memory.
int search(const Lists* lists, const Settings* settings, int64_t count, const float* queries, float* similarities,
           int64_t* rows, int64_t threads) try {
    std::atomic<int64_t> next{0};
    std::atomic<int> failed{0};
    auto work = [&] {
        try {
            static thread_local Scratch scratch;
            for (int64_t start; (start = next.fetch_add(QUERIES_AT_ONCE)) < count;)
                for (int64_t i = start; i < std::min(start + QUERIES_AT_ONCE, count); ++i)
                    Search(*lists, *settings, scratch)
                        .run(queries + i * lists->dim, similarities + i * settings->k, rows + i * settings->k);
        } catch (const std::exception&) {
            failed = 1;
        }
    };
    std::vector<std::thread> others;
    const int64_t wanted = std::min(threads, (count + QUERIES_AT_ONCE - 1) / QUERIES_AT_ONCE) - 1;
    others.reserve(std::max<int64_t>(wanted, 0));
    try {
        while (int64_t(others.size()) < wanted) others.emplace_back(work);
    } catch (const std::exception&) {
        // The machine starts no more threads: those that run do the work.
    }
    work();
    for (auto& thread : others) thread.join();
    return failed;
} catch (const std::exception&) {
    return 1;
}

} // extern "C"
