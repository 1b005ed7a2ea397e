// The nearest of many centroids, of which only rough inner products with a row are known.
//
// The candidates are the centroids with the largest rough products, and at least so many as wanted: they are ranked by
// their float16 numbers. Rough products are float32 or bfloat16.

#pragma once

#include "inner_products.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace {

constexpr int64_t PRODUCTS_AT_ONCE = 256; // 32 times eight: the number of centroids is a multiple of it

// Pointers are borrowed.
struct Centroids {
    int64_t dim;
    int64_t count;
    const uint16_t* rows;     // (count, dim) float16
    int64_t candidates;       // at least so many are ranked
};

struct Single {
    static __m256 eight(const float* values) { return _mm256_loadu_ps(values); }
};

class CentroidRanking {
  public:
    explicit CentroidRanking(const Centroids& centroids) : centroids_(centroids) {}

    // Writes inner products and numbers of the k nearest centroids of a row (dim,), nearest first. products: (count,).
    template <class Format, class Product>
    void run(const Product* products, const float* row, int64_t k, float* similarities, int64_t* numbers) {
        choose<Format>(products);
        ranked_.clear();
        for (size_t i = 0; i < chosen_.size(); ++i) {
            if (i + 2 < chosen_.size()) fetch(centroids_.rows + chosen_[i + 2] * centroids_.dim, 2 * centroids_.dim);
            const uint16_t* centroid = centroids_.rows + chosen_[i] * centroids_.dim;
            ranked_.push_back({-inner_product<Half>(row, centroid, centroids_.dim), chosen_[i]});
        }
        std::partial_sort(ranked_.begin(), ranked_.begin() + k, ranked_.end());
        for (int64_t i = 0; i < k; ++i) {
            similarities[i] = -ranked_[i].first;
            numbers[i] = ranked_[i].second;
        }
    }

  private:
    // Finds all centroids that have at least the product of the last candidate, or a smaller one.
    template <class Format, class Product> void choose(const Product* products) {
        largest_.clear();
        for (int64_t start = 0; start < centroids_.count; start += PRODUCTS_AT_ONCE) {
            __m256 largest = Format::eight(products + start);
            for (int64_t i = 8; i < PRODUCTS_AT_ONCE; i += 8)
                largest = _mm256_max_ps(largest, Format::eight(products + start + i));
            largest_.resize(largest_.size() + 8);
            _mm256_storeu_ps(&largest_[largest_.size() - 8], largest);
        }
        // Each of these is the product of another centroid, so at least so many are as large as the last of them.
        const int64_t wanted = std::min<int64_t>(centroids_.candidates, largest_.size());
        sorted_ = largest_;
        std::nth_element(sorted_.begin(), sorted_.begin() + wanted - 1, sorted_.end(), std::greater<float>());
        const __m256 least = _mm256_set1_ps(sorted_[wanted - 1]);
        chosen_.clear();
        for (int64_t start = 0; start < centroids_.count; start += PRODUCTS_AT_ONCE) {
            if (!at_least(_mm256_loadu_ps(&largest_[start / PRODUCTS_AT_ONCE * 8]), least)) continue;
            for (int64_t i = start; i < start + PRODUCTS_AT_ONCE; i += 8)
                for (int mask = at_least(Format::eight(products + i), least); mask; mask &= mask - 1)
                    chosen_.push_back(i + __builtin_ctz(mask));
        }
    }

    static int at_least(__m256 values, __m256 least) {
        return _mm256_movemask_ps(_mm256_cmp_ps(values, least, _CMP_GE_OQ));
    }

    const Centroids& centroids_;
    std::vector<float> largest_, sorted_;
    std::vector<int64_t> chosen_;
    std::vector<std::pair<float, int64_t>> ranked_;
};

} // namespace
