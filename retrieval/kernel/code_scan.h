// Scores the rows of inverted lists by their 4-bit codes, and keeps the best as candidates.
//
// Reads the packed codes of faiss.IndexIVFPQFastScan. It visits the lists from the nearest on, and ends before a list
// that probably has none of the best rows. So `lists` of the settings is a limit that few queries reach.

#pragma once

#include "inner_products.h"
#include "lists.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t PAIRS_AT_ONCE = 4;  // pairs of codes that are added in bytes: 4 * LARGEST_NUMBER is less than 2^8
constexpr float LARGEST_NUMBER = 63;  // in the tables; with 8 bits as many neighbors are found, in more time
constexpr int OFFSET_BITS = 28, LIST_BITS = 20;
constexpr float DEVIATIONS = 4.5f;    // a list is visited if a row so far above the mean score would be a result
constexpr float MEMORY = 128;        // most weight of the lists before in mean and deviation, in rows
constexpr float KEPT = 0.9f;          // of the deviation after each list, because a list of equal rows has none
constexpr float MIN_ROWS = 48;       // rows of which mean and deviation are known
constexpr int64_t MIN_RESULTS = 10;  // the scan ends as for so many, because single scores have errors
constexpr uint32_t LEVEL = 16;        // scores are counted in groups of so many

struct Visit {
    float similarity;
    int32_t list;
    bool operator<(const Visit& other) const { return similarity > other.similarity; }
};

// What a thread needs while it scans. It is kept for the next queries.
struct ScanScratch {
    std::vector<Visit> visits;
    std::vector<float> products;
    std::vector<uint8_t> tables;
    std::vector<uint64_t> keys;
    std::vector<uint32_t> counts;
};

class CodeScan {
  public:
    // scratch.visits: the lists, nearest first. scratch.keys: the result, one key for each candidate: score, visit and
    // offset in the list; the smallest keys have the best scores.
    CodeScan(const Lists& lists, const Settings& settings, ScanScratch& scratch)
        : lists_(lists), settings_(settings), scratch_(scratch), visits_(scratch.visits), keys_(scratch.keys) {}

    // Computes the tables of a query. The scores of the present visits are in the range of 16 bits.
    void start(const float* query) {
        far_ = visits_.back().similarity;
        tables(query);
        keys_.clear();
        scratch_.counts.assign((1 << 16) / LEVEL, 0);
        least_ = level_ = above_ = 0;
        weight_ = deviation_ = 0;
        sums_ = squares_ = _mm256_setzero_ps();
    }

    // Keeps the best candidates of the visits from `first` on. Returns whether more lists may have better ones.
    bool run(size_t first) {
        for (size_t i = first; i < visits_.size(); ++i) {
            const int bias = std::lrint((visits_[i].similarity - far_) * scale_);
            if (is_useless(bias)) return false;
            scan(i, bias);
            scanned_ = i + 1;
        }
        return true;
    }

    // How far a score of the last scanned list must lie above the mean to be among the best, in deviations. Where too
    // few rows were scanned, as far as no list that is visited.
    float distance() const {
        if (!level_ || weight_ < MIN_ROWS) return DEVIATIONS;
        const int bias = std::lrint((visits_[scanned_ - 1].similarity - far_) * scale_);
        return (float(level_ * LEVEL) - pivot_ - bias - sum(sums_) / weight_) / std::max(deviation_, 1e-9f);
    }

    // Number of lists that were scanned.
    int64_t scanned() const { return scanned_; }

    // Drops all keys but the best `candidates`.
    void reduce() {
        if (keys_.size() <= size_t(settings_.candidates)) return;
        std::nth_element(keys_.begin(), keys_.begin() + settings_.candidates - 1, keys_.end());
        keys_.resize(settings_.candidates);
        least_ = 65535 - int64_t(keys_.back() >> (LIST_BITS + OFFSET_BITS));
    }

    const int64_t* id(uint64_t key) const {
        const int32_t list = visits_[(key >> OFFSET_BITS) & ((1 << LIST_BITS) - 1)].list;
        return lists_.ids[list] + (key & ((1 << OFFSET_BITS) - 1));
    }

    float score(uint64_t key) const { return float(65535 - (key >> (LIST_BITS + OFFSET_BITS))); }

    // Difference of the scores of two similarities with the difference 1.
    float scale() const { return scale_; }

  private:
    // Inner products of the query with all codewords, and numbers of 6 bits from them: (product - least) * scale_.
    void tables(const float* query) {
        const int64_t codes = lists_.codes_per_row, dims = lists_.dims_per_code;
        auto& products = scratch_.products;
        products.resize(17 * codes);
        float* least = products.data() + 16 * codes;
        float largest_span = 1e-20f, total = visits_.front().similarity - far_ + 1e-20f;
        for (int64_t code = 0; code < codes; ++code) {
            __m256 low = _mm256_setzero_ps(), high = low;
            for (int64_t i = code * dims; i < std::min((code + 1) * dims, lists_.dim); ++i) {
                const __m256 value = _mm256_set1_ps(query[i]);
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
        // The sums stay below 2^16, also if all numbers are rounded up.
        scale_ = std::min(LARGEST_NUMBER / largest_span, (65535 - codes - 1) / total);
        scratch_.tables.assign(16 * codes + 32, 0); // half blocks may have one pair more
        for (int64_t code = 0; code < codes; ++code) round(code, least[code]);
    }

    // The table of a code from its inner products.
    void round(int64_t code, float least) {
        const __m256 scale = _mm256_set1_ps(scale_);
        __m256i numbers[2];
        for (int half = 0; half < 2; ++half) {
            const __m256 above = _mm256_loadu_ps(&scratch_.products[16 * code + 8 * half]) - _mm256_set1_ps(least);
            numbers[half] = _mm256_cvtps_epi32(_mm256_mul_ps(above, scale));
        }
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(numbers[0], numbers[1]), 0xd8);
        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i*)&scratch_.tables[16 * code], bytes);
    }

    // Whether the rows of a list, by the scores of the lists before, probably are not among the best.
    bool is_useless(int bias) {
        const float rows = std::max(weight_, 1.f), mean = sum(sums_) / rows;
        deviation_ = std::max(KEPT * deviation_, std::sqrt(std::max(sum(squares_) / rows - mean * mean, 0.f)));
        if (!level_ || weight_ < MIN_ROWS) return false;
        const bool ends_earlier = settings_.condition && scanned_ >= settings_.condition->lists;
        const float deviations = ends_earlier ? std::min(settings_.condition->distance, DEVIATIONS) : DEVIATIONS;
        return pivot_ + bias + mean + deviations * deviation_ < float(level_ * LEVEL);
    }

    // Keeps the best candidates of a list.
    void scan(size_t visit, int bias) {
        const int32_t list = visits_[visit].list;
        const int64_t size = lists_.sizes[list];
        const uint8_t* codes = lists_.codes[list];
        const __m256i plus = _mm256_set1_epi16(uint16_t(std::clamp(bias, 0, 65535)));
        const __m256i minus = _mm256_set1_epi16(uint16_t(std::clamp(-bias, 0, 65535)));
        forget();
        for (int64_t start = 0; start < size; start += BLOCK_ROWS) {
            const uint8_t* next = codes + block_bytes(lists_, size - start);
            int64_t next_bytes = block_bytes(lists_, size - start - BLOCK_ROWS);
            if (!next_bytes) {
                const int32_t other = visits_[std::min(visit + 1, visits_.size() - 1)].list;
                next = lists_.codes[other];
                next_bytes = block_bytes(lists_, lists_.sizes[other]);
            }
            __m256i scores[2];
            if (is_half(lists_, size - start))
                score<true>(codes, next, next_bytes, scores);
            else
                score<false>(codes, next, next_bytes, scores);
            observe(scores, std::min(size - start, BLOCK_ROWS));
            for (int half = 0; half < 2; ++half) {
                scores[half] = _mm256_subs_epu16(_mm256_adds_epu16(scores[half], plus), minus);
                keep(scores[half], visit, start + HALF_ROWS * half, size, lists_.ids[list]);
            }
            codes += block_bytes(lists_, size - start);
        }
    }

    // Sums of the table numbers of 32 rows, or of the 16 of a half block and zeros, as 2 x 16 unsigned 16-bit numbers.
    // Fetches the block `next` meanwhile.
    template <bool HALF>
    void score(const uint8_t* block, const uint8_t* next, int64_t next_bytes, __m256i* scores) const {
        constexpr int64_t PAIRS_OF_LOAD = HALF ? 2 : 1;
        __m256i both[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, odd[2] = {both[0], both[0]};
        const int64_t pairs = lists_.codes_per_row / 2, ahead = next_bytes / std::max<int64_t>(pairs / PAIRS_AT_ONCE, 1);
        int64_t pair = 0;
        for (; pair + PAIRS_AT_ONCE <= pairs; pair += PAIRS_AT_ONCE, next += ahead) {
            fetch(next, ahead);
            add<HALF, PAIRS_AT_ONCE>(block, pair, both, odd);
        }
        for (; pair < pairs; pair += PAIRS_OF_LOAD) add<HALF, PAIRS_OF_LOAD>(block, pair, both, odd);
        for (int half = 0; half < 2; ++half) {
            const __m256i even = _mm256_sub_epi16(both[half], _mm256_slli_epi16(odd[half], 8));
            scores[half] = _mm256_add_epi16(
                _mm256_permute2x128_si256(even, odd[half], 0x20), _mm256_permute2x128_si256(even, odd[half], 0x31));
        }
    }

    // Adds the table numbers of some pairs of codes. A number of `both` counts those of two rows, one of `odd` of one.
    // The upper halves of the bytes are the codes of other rows, or in a half block the next pair of codes.
    template <bool HALF, int64_t PAIRS>
    void add(const uint8_t* block, int64_t first, __m256i* both, __m256i* odd) const {
        const __m256i nibble = _mm256_set1_epi8(15);
        __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int64_t pair = first; pair < first + PAIRS; pair += HALF ? 2 : 1) {
            const __m256i codes = _mm256_loadu_si256((const __m256i*)(block + (HALF ? 16 : 32) * pair));
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
            __m256i& upper = sums[HALF ? 0 : 1];
            sums[0] = _mm256_add_epi8(sums[0], _mm256_shuffle_epi8(table(pair), _mm256_and_si256(codes, nibble)));
            upper = _mm256_add_epi8(upper, _mm256_shuffle_epi8(table(HALF ? pair + 1 : pair), high));
        }
        for (int half = 0; half < (HALF ? 1 : 2); ++half) {
            both[half] = _mm256_add_epi16(both[half], sums[half]);
            odd[half] = _mm256_add_epi16(odd[half], _mm256_srli_epi16(sums[half], 8));
        }
    }

    // Tables of a pair of codes.
    __m256i table(int64_t pair) const {
        return _mm256_loadu_si256((const __m256i*)(scratch_.tables.data() + 32 * pair));
    }

    // Lowers the weight of the lists before in mean and deviation, because nearer lists have other scores.
    void forget() {
        const float kept = std::min(weight_, MEMORY), factor = kept / std::max(weight_, 1.f);
        sums_ = _mm256_mul_ps(sums_, _mm256_set1_ps(factor));
        squares_ = _mm256_mul_ps(squares_, _mm256_set1_ps(factor));
        weight_ = kept;
    }

    // Adds the scores of `count` rows, without the bias of their list, to mean and deviation.
    void observe(const __m256i* scores, int64_t count) {
        if (!weight_) pivot_ = uint16_t(_mm256_extract_epi16(scores[0], 0));
        const __m256i pivot = _mm256_set1_epi16(uint16_t(pivot_)), ones = _mm256_set1_epi16(1);
        const __m256i numbers = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int half = 0; half < 2; ++half) {
            const __m256i counted = _mm256_cmpgt_epi16(_mm256_set1_epi16(int16_t(count - 16 * half)), numbers);
            const __m256i above = _mm256_and_si256(counted, _mm256_sub_epi16(scores[half], pivot));
            sums_ = _mm256_add_ps(sums_, _mm256_cvtepi32_ps(_mm256_madd_epi16(above, ones)));
            squares_ = _mm256_add_ps(squares_, _mm256_cvtepi32_ps(_mm256_madd_epi16(above, above)));
        }
        weight_ += count;
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
            count(values[i] / LEVEL);
        }
        if (keys_.size() >= size_t(2 * settings_.candidates + BLOCK_ROWS)) reduce();
    }

    // Raises `level_` as long as enough scores are above it: 2 a result, because a row can be in two lists.
    void count(uint32_t level) {
        if (level < level_) return;
        auto& counts = scratch_.counts;
        ++counts[level];
        ++above_;
        const int64_t enough = 2 * std::max(settings_.k, MIN_RESULTS);
        while (above_ - counts[level_] >= enough) above_ -= counts[level_++];
    }

    const Lists& lists_;
    const Settings& settings_;
    ScanScratch& scratch_;
    std::vector<Visit>& visits_;
    std::vector<uint64_t>& keys_;
    float far_ = 0, scale_ = 0;
    int64_t scanned_ = 0;
    int64_t least_ = 0;            // the score that a new candidate exceeds
    uint32_t level_ = 0;           // the best rows have scores of this group or above
    int64_t above_ = 0;            // number of them
    float pivot_ = 0, weight_ = 0, deviation_ = 0; // scores are counted from the first one on
    __m256 sums_, squares_;        // of the scores
};

} // namespace
